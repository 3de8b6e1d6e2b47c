"""Methods by name: `@register_method` adds one, `parse` reads the list of a command line."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import tofu_sd
from tofu_sd import TokenFusionConfig, recipes
from tofu_sd.core.matching import BUILT_IN_MATCHERS, MATCHERS
from tofu_sd.core.reductions import BUILT_IN_REDUCTIONS, REDUCTIONS
from tofu_sd.utils import RegistrationError, did_you_mean

from .. import EvalError
from ..common.files import digest
from ..common.provenance import version
from .method import BASELINE, Method

BASELINE_ALIAS = "full"  # its name in the papers and in earlier versions
RESERVED = (BASELINE.name, BASELINE_ALIAS, "ideal")  # rows that are no methods

Apply = TypeVar("Apply", bound=Callable[..., AbstractContextManager[Any]])


@dataclass(frozen=True)
class MethodSpec:
    """What `register_method` knows of a method that is no configuration of this package.

    Args:
        apply: a context manager of a pipeline or UNet; takes `ratio` or `inner` too, as below.
        source: the file that defines it.
        package: (the module, its name on PyPI) that it needs.
        takes_ratio: whether `apply` takes `ratio`.
        stackable: whether `apply` takes `inner`, the context manager of another method to run inside this one.
        period: after how many steps it does the same again.
        varies: whether images differ in cost.
        fits: whether it changes models of a class of UNets or transformers; None for any.
        check: raises EvalError for a pipeline and a latent's side that it cannot take.
    """

    apply: Callable[..., AbstractContextManager[Any]]
    source: Path
    package: tuple[str, str] | None = None
    takes_ratio: bool = False
    stackable: bool = False
    period: int = 1
    varies: bool = False
    fits: Callable[[type[Any]], bool] | None = None
    check: Callable[[Any, int], None] | None = None

    @property
    def unavailable_reason(self) -> str | None:
        """How to install what it needs; None where it is installed."""
        # not whether it can be imported: any folder of its name, such as a clone nearby, can
        if self.package is None or version(self.package[1]):
            return None
        return f"pip install {self.package[1]}"

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its images: its file, and the version of its package or the library that finds its blocks."""
        if self.package is not None:
            return {"source": digest(self.source), self.package[0]: version(self.package[1])}
        return {"source": digest(self.source), "code": source_hash()}


METHODS: dict[str, MethodSpec] = {}


def register_method(name: str, **spec: Any) -> Callable[[Apply], Apply]:
    """Makes a method available as `--method NAME`. A decorator of a context manager that takes a pipeline.

    Args:
        name: letters, digits, "-" and "_"; no recipe of this package has it.
        spec: further fields of MethodSpec, such as `takes_ratio=True`.

    Raises:
        RegistrationError: the name has other characters, or is taken.
    """
    if not name.replace("-", "_").isidentifier():
        raise RegistrationError(
            f"the method's name is {name!r}; letters, digits, '-' and '_' alone, as it names a folder"
        )

    def register(apply: Apply) -> Apply:
        source = Path(inspect.unwrap(apply).__code__.co_filename)
        taken = METHODS.get(name)
        if name in (*RESERVED, *recipes.RECIPES) or (taken is not None and taken.source != source):
            raise RegistrationError(f"a method named {name!r} exists already: give yours another name")
        METHODS[name] = MethodSpec(apply, source, **spec)
        return apply

    return register


def parse(names: str, ratios: list[float]) -> list[Method]:
    """The methods of a list such as "tofu,kv:tome+p", each at every ratio, in that order and each once.

    Raises:
        EvalError: an unknown method, a value out of range, or two names of one and the same method.
    """
    methods: dict[str, Method] = {}
    for name in (part.strip() for part in names.split(",")):
        for ratio in ratios:
            method = _one(name, ratio)
            other = methods.setdefault(method.slug, method)
            if other.name != method.name or other.identity != method.identity:
                raise EvalError(
                    f"{other.name!r} and {method.name!r} would share the row and the folder {method.slug!r}: leave out "
                    "one of them"
                )
    return list(methods.values())


def known_methods(stackable: bool | None = None, denoiser: type[Any] | None = None) -> list[str]:
    """Names of the registered methods.

    Args:
        stackable: only those that can be stacked on another one, or only the others.
        denoiser: only those that fit this class of UNets or transformers.
    """
    _load_own_methods()

    def fits(spec: MethodSpec) -> bool:
        return denoiser is None or spec.fits is None or spec.fits(denoiser)

    return [name for name, spec in METHODS.items() if stackable in (None, spec.stackable) and fits(spec)]


def outer_and_inner(name: str) -> tuple[str | None, str]:
    """Splits the name of stacked methods: "deepcache:tofu" is ("deepcache", "tofu"), "deepcache" ("deepcache", "")."""
    outer, colon, inner = name.partition(":")
    if outer in known_methods(stackable=True) and (inner or not colon):
        return outer, inner
    return None, name


def _one(name: str, ratio: float) -> Method:
    _load_own_methods()
    if name in (BASELINE.name, BASELINE_ALIAS):
        return BASELINE
    if ".py:" in name:
        return _from_file(name, ratio)
    outer, inner = outer_and_inner(name)
    if outer is not None:
        return _stacked(name, METHODS[outer], outer, _one(inner, ratio) if inner else BASELINE)
    try:
        if name in METHODS:
            return _registered(name, TokenFusionConfig(ratio=ratio).ratio)  # the same limits, with the same message
        fusion = _of_any_machine(recipes.named(name, ratio), name)
    except recipes.UnknownMethodError as error:
        known = [BASELINE.name, *recipes.RECIPES, *METHODS]
        stackable = " or ".join(f"{one}:" for one in known_methods(stackable=True))
        raise EvalError(
            f"unknown method {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}; this package's also with "
            f"the prefix kv:, the suffix +p and @option=value at the end; the prefix {stackable} stacks two methods; "
            "FILE.py:NAME loads one from a file"
        ) from error
    except (ValueError, TypeError) as error:
        raise EvalError(_with_hint(error)) from error
    return _of_config(name, fusion)


def _with_hint(error: Exception) -> str:
    """The message of an invalid configuration, with how a matcher or reduction of a file is loaded."""
    from_file = str(error).startswith(("matching is", "unknown reduction"))
    return f"{error}" + "; --method FILE.py:NAME loads one from a file" * from_file


def _of_config(name: str, fusion: TokenFusionConfig, source: dict[str, Any] | None = None) -> Method:
    """The method of a configuration of this package."""
    identity = {"fusion": repr(fusion_fields(fusion)), "code": source_hash(), **(source or {})}
    name = "@".join(part for part in name.split("@") if not part.startswith("ratio="))  # the ratio is shown anyway
    apply = partial(tofu_sd.patched, ratio=fusion)
    varies = fusion.threshold is not None
    return Method(name, fusion.slug, fusion.ratio, identity, apply, fusion, period=fusion.match_interval, varies=varies)


def _registered(name: str, ratio: float) -> Method:
    spec = METHODS[name]
    slug = f"{name}-r{100 * ratio:g}" if spec.takes_ratio else name
    shown = ratio if spec.takes_ratio else None
    if spec.unavailable_reason:
        return Method(name, slug, shown, unavailable_reason=spec.unavailable_reason)
    apply = partial(spec.apply, ratio=ratio) if spec.takes_ratio else spec.apply
    return Method(name, slug, shown, spec.identity, apply, period=spec.period, varies=spec.varies, check=spec.check)


def _stacked(name: str, spec: MethodSpec, outer: str, inner: Method) -> Method:
    slug = outer if inner is BASELINE else f"{outer}-{inner.slug}"
    if reason := spec.unavailable_reason or inner.unavailable_reason:
        return Method(name, slug, inner.ratio, unavailable_reason=reason)
    identity = {**inner.identity, **{f"{outer} {key}": value for key, value in spec.identity.items()}}
    apply = partial(spec.apply, inner=inner.apply)
    period = math.lcm(spec.period, inner.period)
    return Method(
        name, slug, inner.ratio, identity, apply, inner.fusion, period=period, varies=spec.varies or inner.varies,
        needs_full_unet=True, check=inner.check,
    )  # fmt: skip


def _from_file(name: str, ratio: float) -> Method:
    """The method of `FILE.py:NAME[@option=value]`.

    NAME is a registered method, matcher or reduction (early and late), or a TokenFusionConfig of that file.
    """
    file, _, rest = name.rpartition(".py:")
    path = Path(f"{file}.py")
    own, *changes = rest.split("@")
    module = _load(path.resolve())  # once, however the path is written
    config = getattr(module, own, None)
    _check_free(path, own)
    try:
        if own in METHODS:
            if changes:
                raise EvalError(f"--method {path.name}: {own!r} is a whole-pipeline patch and has no @option=value")
            return _registered(own, TokenFusionConfig(ratio=ratio).ratio)
        options = {"ratio": ratio, **dict(recipes.option(change, name) for change in changes)}
        if isinstance(config, TokenFusionConfig):
            config = TokenFusionConfig.of(config, **options)
        elif own in MATCHERS and own not in BUILT_IN_MATCHERS:
            config = TokenFusionConfig.of(**{"matching": own, **options})
        elif own in REDUCTIONS and REDUCTIONS[own] not in BUILT_IN_REDUCTIONS:
            config = TokenFusionConfig.of(**{"early": own, "late": own, **options})
        else:
            raise EvalError(_unknown_in_file(path, module, own))
    except (ValueError, TypeError) as error:
        raise EvalError(_with_hint(error)) from error
    return _of_config("@".join([own, *changes]), _of_any_machine(config, name), {"source": digest(path)})


def _of_any_machine(config: TokenFusionConfig, name: str) -> TokenFusionConfig:
    """The configuration that merges all maps unless the name says otherwise: figures do not depend on the machine."""
    return config if "@min_tokens=" in name else dataclasses.replace(config, min_tokens=0)


def _unknown_in_file(path: Path, module: Any, own: str) -> str:
    """The message that a file has nothing of this name."""
    configs = [
        name
        for name, value in vars(module).items()
        if isinstance(value, TokenFusionConfig) and value not in recipes.RECIPES.values()
    ]
    known = [*_registered_by(path), *configs]
    if not known:
        return (
            f"{path.name} registers nothing and has no TokenFusionConfig: use @register_method, @register_matcher or "
            "@register_reduction"
        )
    return f"{path.name} has no {own!r}{did_you_mean(own, known)}; it has {', '.join(known)}"


def _registered_by(path: Path) -> list[str]:
    """The names of methods, matchers and reductions that a file has registered."""
    sources = {name: spec.source for name, spec in METHODS.items()}
    functions: list[tuple[str, Callable[..., Any]]] = [*MATCHERS.items(), *REDUCTIONS.items()]
    for name, function in functions:
        if code := getattr(inspect.unwrap(function), "__code__", None):
            sources[name] = Path(code.co_filename)
    return [name for name, source in sources.items() if source.resolve() == path.resolve()]


def _check_free(path: Path, own: str) -> None:
    """EvalError where a name of a file, or the requested one, is that of another method: they would share labels."""
    elsewhere = [name for name, spec in METHODS.items() if spec.source.resolve() != path.resolve()]
    for name in (*_registered_by(path), own):
        if name in (*RESERVED, *recipes.RECIPES, *elsewhere):
            raise EvalError(f"--method {path.name}: a method named {name!r} exists already: give yours another name")


@cache
def _load(path: Path) -> Any:
    """The module in a file, run once. EvalError where that fails."""
    if not path.is_file():
        raise EvalError(f"--method {path.name}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"method_of_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except RegistrationError as error:
        raise EvalError(f"--method {path.name}: {error}") from error
    except Exception as error:  # whatever a user's file raises
        raise EvalError(f"--method {path.name}: {type(error).__name__}: {error}") from error
    return module


@cache
def _load_own_methods() -> None:
    """Imports the other files of this folder, each of which registers its method."""
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.stem not in ("__init__", "registry", "method"):
            importlib.import_module(f"{__package__}.{file.stem}")


def has_outside_code(fusion: TokenFusionConfig | None) -> bool:
    """Whether the matcher or a reduction of a configuration is not built in."""
    if fusion is None:
        return False
    reductions = [value for value in vars(fusion).values() if callable(value)]
    return fusion.matching not in BUILT_IN_MATCHERS or any(one not in BUILT_IN_REDUCTIONS for one in reductions)


def fusion_fields(fusion: Any) -> dict[str, Any]:
    """The fields of a configuration, functions by their names, so that it reads the same in every process."""
    return {name: getattr(value, "__name__", value) for name, value in vars(fusion).items()}


@cache
def source_hash() -> str:
    """Changes with the code that decides images: matching, merging, kernels, patching and the diffusers host."""
    return digest(*_sources())


def _sources() -> Iterator[Path]:
    root = Path(tofu_sd.__file__).parent
    for folder in ("core", "kernels", "patching", "hosts/diffusers_transformers"):
        yield from sorted((root / folder).rglob("*.py"))
    yield root / "config.py"
    yield root / "config_fields.py"
    yield from sorted((root / "hosts").glob("diffusers*.py"))
