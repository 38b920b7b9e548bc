"""One file per source of items, events and users."""
