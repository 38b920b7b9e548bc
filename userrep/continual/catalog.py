"""All methods by their names in configs."""

from collections.abc import Callable
from typing import Any

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


Build = Callable[[Network, Any, NewBackbone], Method]

# Class of the options, and what makes the method with them.
METHODS: dict[str, tuple[type[Config], Build]] = {
    "sinmo": (NoOptions, lambda network, _, new_backbone: SinMo(network, new_backbone)),
    "fineall": (NoOptions, lambda network, *_: FineAll(network)),
    "mtl": (NoOptions, lambda network, *_: Mtl(network)),
    "peterrec": (PeterRecConfig, lambda network, config, _: PeterRec(network, config)),
    "piggyback": (PiggybackConfig, lambda network, config, _: Piggyback(network, config)),
    "hat": (HatConfig, lambda network, config, _: Hat(network, config)),
    "conure": (ConureConfig, lambda network, config, _: Conure(network, config)),
    "teracon": (TeraconConfig, lambda network, config, _: Teracon(network, config)),
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
    config_class, build = METHODS[name]
    return build(Network(new_backbone()), config_class.parse(options), new_backbone)
