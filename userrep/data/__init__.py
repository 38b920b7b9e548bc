"""Raw events to token batches."""
