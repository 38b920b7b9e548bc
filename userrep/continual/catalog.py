"""All methods by their names in configs."""

from collections.abc import Callable
from typing import Any, NamedTuple

from userrep.config import Config, ConfigError
from userrep.continual.baselines import FineAll, Mtl, SinMo
from userrep.continual.conure import Conure, ConureConfig
from userrep.continual.hat import Hat, HatConfig
from userrep.continual.method import Method
from userrep.continual.network import Network
from userrep.continual.peterrec import PeterRec, PeterRecConfig
from userrep.continual.piggyback import Piggyback, PiggybackConfig
from userrep.continual.teracon import Teracon, TeraconConfig
from userrep.models.backbone import Backbone

NewBackbone = Callable[[], Backbone]  # makes a freshly initialised backbone


class NoOptions(Config):
    """Of a method without options."""


class Entry(NamedTuple):
    """A method of the catalog."""

    options: type[Config]
    method: type[Method]
    build: Callable[[Network, Any, NewBackbone], Method]


METHODS: dict[str, Entry] = {
    "sinmo": Entry(NoOptions, SinMo, lambda network, _, new_backbone: SinMo(network, new_backbone)),
    "fineall": Entry(NoOptions, FineAll, lambda network, *_: FineAll(network)),
    "mtl": Entry(NoOptions, Mtl, lambda network, *_: Mtl(network)),
    "peterrec": Entry(PeterRecConfig, PeterRec, lambda network, config, _: PeterRec(network, config)),
    "piggyback": Entry(PiggybackConfig, Piggyback, lambda network, config, _: Piggyback(network, config)),
    "hat": Entry(HatConfig, Hat, lambda network, config, _: Hat(network, config)),
    "conure": Entry(ConureConfig, Conure, lambda network, config, _: Conure(network, config)),
    "teracon": Entry(TeraconConfig, Teracon, lambda network, config, _: Teracon(network, config)),
}


def build_method(name: str, options: dict[str, Any], new_backbone: NewBackbone) -> Method:
    """A method that knows no task yet.

    Args:
        name: of METHODS.
        options: of the method; those that are not given keep their defaults.
        new_backbone: called once, and by SinMo for every task after the first.

    Raises:
        ConfigError: unknown name or option.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}: use one of {', '.join(METHODS)}")
    entry = METHODS[name]
    return entry.build(Network(new_backbone()), entry.options.parse(options), new_backbone)
