"""The presets as structured configs: Hydra refuses a mistyped threshold or a wrong type itself."""

from __future__ import annotations

from dataclasses import fields, make_dataclass
from types import GenericAlias, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore

from lightning_samrefine.config import PRESETS, RefineConfig

GROUP = "samrefine/refine"


def register() -> None:
    """Put every preset into Hydra's store, as an option of the group ``samrefine/refine``."""
    hints = get_type_hints(RefineConfig)
    node = make_dataclass(
        "Refine", [(field.name, storable_type(hints[field.name])) for field in fields(RefineConfig)]
    )
    for name in PRESETS:
        values = vars(RefineConfig.preset(name))
        ConfigStore.instance().store(
            group=GROUP, name=name, node=node(**values), provider="lightning-samrefine"
        )


def storable_type(hint: Any) -> Any:
    """Return OmegaConf's equivalent of a Python type; Any if it has none."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        known = [storable_type(arg) for arg in args if arg is not NoneType]
        single = known[0] if len(known) == 1 else Any
        return single | None if NoneType in args and single is not Any else single
    if origin is Literal:
        kinds = {type(arg) for arg in args}
        return kinds.pop() if len(kinds) == 1 else Any
    if origin is tuple and args[1:] == (Ellipsis,):
        return GenericAlias(list, args[:1])  # list[…] of a type known at run time
    # Mappings too: Hydra cannot override one that is None (an AttributeError in OmegaConf's merge).
    return hint if hint in (int, float, bool, str) else Any
