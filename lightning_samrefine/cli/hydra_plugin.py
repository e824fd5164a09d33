"""Makes Hydra find the config group ``samrefine`` in every app of the environment.

The wheel contains this module as ``hydra_plugins/lightning_samrefine_searchpath.py``. Hydra imports
it at the start of every app of the environment, so it must load fast and never fail.
"""

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class SAMRefineSearchPath(SearchPathPlugin):
    """Appends the package's folder to the app's own search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the YAML files of the group, and the typed presets of its thresholds."""
        package = find_spec("lightning_samrefine")
        if package is None or package.origin is None:
            return
        # A path: looking into the package with pkg:// would import what its modules import.
        folder = Path(package.origin).parent / "searchpath"
        search_path.append("lightning-samrefine", f"file://{folder}")

        from lightning_samrefine.cli.hydra_presets import register

        register()
