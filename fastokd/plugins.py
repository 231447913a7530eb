"""Plug-ins: Python files and modules that register methods, networks, datasets and more.

A plug-in is written as ``FILE.py``, ``MODULE``, ``MODULE:FUNCTION`` (called without arguments) or
``MODULE@FOLDER``, for a module that is imported from a folder. Importing it calls functions such as
``fastokd.methods.register_method``. Installed packages name theirs in the entry-point group
``fastokd.plugins``; they are loaded when a name is unknown or names are listed.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastokd.errors import ConfigError, first_line

GROUP = "fastokd.plugins"
"""The entry-point group of installed plug-ins."""


class Plugin(NamedTuple):
    """The parts of a plug-in's text; ``function`` and ``folder`` may be empty."""

    module: str
    function: str
    folder: str
    file: Path | None
    """For ``FILE.py``."""

    @classmethod
    def parse(cls, text: str) -> "Plugin":
        """Split the text of a plug-in."""
        if text.endswith(".py"):
            path = Path(text).expanduser().absolute()
            return cls(path.stem.replace(".", "_"), "", str(path.parent), path)
        head, _, folder = text.partition("@")
        module, _, function = head.partition(":")
        return cls(module, function, folder, None)


_loaded: dict[str, str] = {}
"""The stored text of each loaded plug-in by the name of its module."""
_origins: dict[str, str] = {}
"""The stored text of the plug-in that registered a name."""
_explicit: set[str] = set()
"""The modules of plug-ins that were not loaded for a run or a package."""
_failures: list[str] = []
"""Messages about installed plug-ins that cannot be imported."""
_current: list[str] = []
"""The plug-ins that are being imported, the innermost last."""
_installed_are_loaded = False


def load_plugins(texts: Iterable[str], user: str = "") -> tuple[str, ...]:
    """Import plug-ins, each once per process, in this order.

    A plug-in whose module name is already loaded is not imported again, so that a run's plug-in can
    be replaced by one at another path.

    Args:
        texts: see above.
        user: the run that needs them, for messages.

    Returns:
        The texts with absolute paths, valid in any working folder.

    Raises:
        ConfigError: a plug-in is missing or its import raises an error.
    """
    return tuple(_load(text, f" of {user}" if user else "") for text in texts)


class _NoModule(ConfigError):
    """There is no module of a plug-in's name."""


def _load(text: str, of: str) -> str:
    plugin = Plugin.parse(text)
    if not plugin.module:
        raise ConfigError(f"plug-in '{text}': it has no name; pass FILE.py or MODULE")
    if plugin.module in _loaded:
        return _already_loaded(plugin, text, of)
    if plugin.file is not None and plugin.file == script():
        return str(plugin.file)  # the running program has registered its names
    if plugin.file is not None and not plugin.file.is_file():
        fix = f"pass --plugin PATH/{plugin.file.name}" if of else "check the path"
        raise ConfigError(f"plug-in {text}{of}: there is no such file; {fix}")
    stored = str(plugin.file) if plugin.file else _stored(plugin, text, of)
    _loaded[plugin.module] = stored
    _current.append(stored)
    try:
        with _one_line_errors(text, of, plugin):
            module = _import_file(plugin) if plugin.file else importlib.import_module(plugin.module)
            if plugin.function:
                getattr(module, plugin.function)()
    except BaseException:
        del _loaded[plugin.module]
        raise
    finally:
        _current.pop()
    if not of:
        _explicit.add(plugin.module)
    return stored


def _already_loaded(plugin: Plugin, text: str, of: str) -> str:
    """The stored text of a plug-in whose module name is loaded; an error if it is another one."""
    loaded = _loaded[plugin.module]
    other = Plugin.parse(loaded).file
    if plugin.file and other and plugin.file != other and not (of and plugin.module in _explicit):
        same = plugin.file.is_file() and plugin.file.read_bytes() == other.read_bytes()
        if not same:
            raise ConfigError(
                f"plug-in {text}{of}: {loaded}, another file of that name, is loaded; rename one of"
                f" them, or pass --plugin PATH/{plugin.file.name} to use one file for all runs"
            )
    return loaded


def _stored(plugin: Plugin, text: str, of: str) -> str:
    """The text of a module with its folder, unless it is installed. The working folder and the
    plug-in's folder are searched last.
    """
    for folder in (str(Path.cwd()), plugin.folder):
        if folder and folder not in sys.path:
            sys.path.append(folder)
    importlib.invalidate_caches()
    parent = plugin.module.partition(".")[0]
    try:
        found = importlib.util.find_spec(parent)
    except (ImportError, ValueError):
        found = None
    if found is None:
        where = f" in {plugin.folder}" if plugin.folder else ""
        place = f"--plugin {plugin.module}@FOLDER with the folder that holds it"
        fix = "install its package, or pass " + (place if of else "FILE.py")
        raise _NoModule(f"plug-in {text}{of}: there is no module '{parent}'{where}; {fix}")
    locations = list(found.submodule_search_locations or [found.origin or ""])
    root = str(Path(locations[0]).absolute().parent)
    installed = {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")}
    name = f"{plugin.module}:{plugin.function}" if plugin.function else plugin.module
    return name if root in installed else f"{name}@{root}"


def _import_file(plugin: Plugin) -> object:
    """Import a file as a top-level module, like a script: modules next to it can be imported."""
    assert plugin.file is not None
    existing: Any = sys.modules.get(plugin.module)
    found = existing or importlib.util.find_spec(plugin.module)
    if found is not None:
        origin = getattr(found, "__file__", None) or getattr(found, "origin", None)
        if origin is None or Path(origin).resolve() != plugin.file.resolve():
            raise ConfigError(
                f"plug-in {plugin.file}: another module is named '{plugin.module}'; rename the file"
            )
    if existing is not None:
        return existing
    if plugin.folder not in sys.path:
        sys.path.append(plugin.folder)
    spec = importlib.util.spec_from_file_location(plugin.module, plugin.file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[plugin.module] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[plugin.module]
        raise
    return module


@contextlib.contextmanager
def _one_line_errors(text: str, of: str, plugin: Plugin) -> Iterator[None]:
    """Turn any error of a plug-in's import into a ``ConfigError`` with its position."""
    try:
        yield
    except ConfigError:
        raise
    except SystemExit as error:
        raise ConfigError(
            f"plug-in {text}{of}: it ends the program when it is imported; move its calls of main()"
            " below 'if __name__ == \"__main__\":'"
        ) from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in frames if frame.filename == str(plugin.file)] or frames
        place = f" ({inside[-1].filename}, line {inside[-1].lineno})"
        if isinstance(error, SyntaxError) and error.filename:
            place = f" ({error.filename}, line {error.lineno})"
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(
            f"plug-in {text}{of}: its import raises {reason}{place}; fix it, or omit the plug-in"
        ) from error


def load_installed() -> None:
    """Load the plug-ins of installed packages, once. One that fails is skipped with a warning."""
    global _installed_are_loaded
    if _installed_are_loaded:
        return
    _installed_are_loaded = True
    for entry in importlib.metadata.entry_points(group=GROUP):
        distribution = entry.dist.name if entry.dist else "?"
        try:
            load_plugins([entry.value], f"the package {distribution}")
        except ConfigError as error:
            _failures.append(str(error))
            warnings.warn(f"{error}; skipping it", stacklevel=2)


def script() -> Path | None:
    """The running program's file if it has registered a name, else None."""
    path = _main_file()
    return path if path is not None and str(path) in _origins.values() else None


def _main_file() -> Path | None:
    file = getattr(sys.modules["__main__"], "__file__", None)
    return Path(file).absolute() if file else None


def note_registration(name: str, module: str) -> None:
    """Record the origin of a registered name, whose object is in ``module``."""
    if _current:
        _origins[name] = _current[-1]
    elif module == "__main__" and (path := _main_file()) is not None:
        _origins[name] = str(path)


def note_network(name: str, module: str) -> None:
    """Record the module of a network such as "mypackage.nets:make_net" as its origin."""
    _origins.setdefault(name, _loaded[module])


def origins(names: Iterable[str]) -> tuple[str, ...]:
    """The plug-ins that these names of methods, networks, datasets or loaders come from."""
    return tuple(dict.fromkeys(_origins[name] for name in names if name in _origins))


def is_loaded(module: str) -> bool:
    """True if a plug-in of this module name is loaded, or the program has imported the module."""
    return module in _loaded or module in sys.modules


def hint() -> str:
    """The end of a message about an unknown name: plug-ins that failed or register nothing."""
    silent = [stored for stored in _loaded.values() if stored not in _origins.values()]
    texts = [
        f"; the plug-in {stored} registers nothing when it is imported: move its calls of"
        " register_... out of 'if __name__ == \"__main__\":'"
        for stored in silent
    ]
    return "".join([*texts, *(f"; {failure}" for failure in _failures)])


def plugin_network(text: str) -> Callable[..., object] | None:
    """The callable of "MODULE:NAME", from a loaded plug-in or a module that can be imported.

    Returns:
        The callable; None if there is no such module.

    Raises:
        ConfigError: the import fails, or the module has no such callable.
    """
    name, _, attribute = text.partition(":")
    if name not in _loaded:
        try:
            load_plugins([name])
        except _NoModule:
            return None
    module = sys.modules[name]
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(
            f"model '{text}': {getattr(module, '__file__', name)} has no function or class"
            f" '{attribute}'"
        )
    note_network(text, name)
    return function
