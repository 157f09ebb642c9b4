"""What options of several subcommands are made of: numbers, lists, a `DGAConfig`, output paths."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from flexdga import DGAConfig

from .errors import UsageError
from .measure import MAX_ROUNDS, MIN_ROUNDS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRESETS: dict[str, Callable[..., DGAConfig]] = {
    name: getattr(DGAConfig, name)
    for name in (
        "paper", "cca", "streaming_llm", "lm_infinite", "h2o", "snapkv", "block_selection", "dense"
    )
}  # fmt: skip
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def positive_int(text: str) -> int:
    """An int of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an int of at least 1, got {text!r}")
    return int(text)


def add_machine(parser: argparse.ArgumentParser) -> None:
    """`--dtype`, `--device` and `--threads`."""
    add = parser.add_argument
    add("--dtype", choices=list(DTYPES), default="float32")
    add("--device", choices=["cpu", "cuda"], default=default_device())
    add("--threads", type=positive_int, metavar="N", help="CPU threads (default torch's)")


def add_repeats(parser: argparse.ArgumentParser, budget: float) -> None:
    """`--repeats`; without it, as many rounds as `budget` seconds hold."""
    parser.add_argument(
        "--repeats",
        type=positive_int,
        metavar="N",
        help=f"rounds at every length (default as many as {budget:g} s hold, "
        f"{MIN_ROUNDS} to {MAX_ROUNDS})",
    )


def lengths(text: str) -> tuple[int, ...]:
    """Comma-separated positive ints, ascending and each once, for argparse."""
    return tuple(sorted({positive_int(part.strip()) for part in text.split(",")}))


def layers(text: str) -> tuple[int, ...]:
    """Comma-separated layer indices, or `all` (empty), for argparse."""
    if text == "all":
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected 'all' or indices such as 0,5, got {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def default_device() -> str:
    """`cuda` where there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> torch.device:
    """The device of that name, if this machine has it."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this PyTorch sees no CUDA device; expected cpu")
    return torch.device(name)


def parse_config(pairs: Sequence[str], base: DGAConfig | None = None, **defaults: Any) -> DGAConfig:
    """The `DGAConfig` that `--config key=value ...` asks for.

    Args:
        pairs: `key=value`, the key a field of DGAConfig or `preset` (of `PRESETS`).
        base: what they change, unless a preset is named; None: DGAConfig's own defaults.
        defaults: fields that differ from these defaults unless a pair names them.
    """
    hints = get_type_hints(DGAConfig)
    kinds = {field.name: hints[field.name] for field in _fields()}
    make: Callable[..., DGAConfig] = DGAConfig
    if base is not None:
        make = functools.partial(dataclasses.replace, base)
    changes = dict(defaults)
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or (key != "preset" and key not in kinds):
            raise UsageError(
                f"--config {pair}: expected key=value with a key of: preset, {', '.join(kinds)}"
            )
        if key == "preset":
            if text not in PRESETS:
                raise UsageError(f"--config {pair}: expected a preset of: {', '.join(PRESETS)}")
            make = PRESETS[text]
            continue
        try:
            changes[key] = _parse_value(text, kinds[key])
        except ValueError as error:
            raise UsageError(f"--config {pair}: expected {_spell(kinds[key])}") from error
    try:
        return make(**changes)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--config: {error}") from error


def non_default_fields(config: DGAConfig) -> dict[str, Any]:
    """The fields in which `config` differs from `DGAConfig()`."""
    plain = DGAConfig()
    names = [field.name for field in _fields()]
    return {n: getattr(config, n) for n in names if getattr(config, n) != getattr(plain, n)}


def _fields() -> list[dataclasses.Field[Any]]:
    """What a caller of DGAConfig chooses; it derives other fields from them."""
    return [field for field in dataclasses.fields(DGAConfig) if field.init]


def _parse_value(text: str, kind: Any) -> Any:
    """`text` as a field's annotated type; ValueError where it is none."""
    if isinstance(kind, types.UnionType):  # int | None is the only one
        return None if text.lower() == "none" else _parse_value(text, get_args(kind)[0])
    if get_origin(kind) is tuple:
        return tuple(int(part) for part in text.split(","))
    if get_origin(kind) is Literal:
        return text  # DGAConfig knows the choices
    if kind is bool:
        if text.lower() not in _BOOLS:
            raise ValueError(text)
        return _BOOLS[text.lower()]
    return kind(text)


def _spell(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "comma-separated ints, such as 128,128"
    if kind is bool:
        return "true or false"
    return f"{kind.__name__}" if isinstance(kind, type) else f"{kind}"


def check_output(option: str, path: str | None, suffix: str | None = None) -> None:
    """Fail unless a file can be written at `path` (None and `-` always can)."""
    if path is None or path == "-":
        return
    target = Path(path)
    if not target.parent.is_dir():
        raise UsageError(f"{option} {path}: the folder {target.parent} does not exist")
    if target.is_dir():
        raise UsageError(f"{option} {path}: expected a file, this is a folder")
    if suffix is not None and target.suffix.lower() != suffix:
        raise UsageError(f"{option} {path}: expected a name that ends in {suffix}")


def check_outputs(json: str | None, csv: str | None, plot: str | None) -> None:
    """Fail unless `--json`, `--csv` and `--plot` can be written."""
    check_output("--json", json)
    check_output("--csv", csv)
    check_output("--plot", plot, ".png")
    if plot is not None:
        check_installed("--plot", "matplotlib", "plot")


def check_model_folder(path: Path) -> None:
    """Fail unless a transformers model can be read from there."""
    check_installed("--model", "transformers", "hf")
    if not (path / "config.json").is_file():
        raise UsageError(f"--model {path}: expected a model's folder, with a config.json")


def check_installed(option: str, module: str, extra: str) -> None:
    """Fail unless the optional dependency `module` is there."""
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"{option} needs {module}: pip install flexdga[{extra}]")
