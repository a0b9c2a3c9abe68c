"""The command line, ``tvm-sparse COMMAND``; `COMMANDS` lists them.

Exit codes: 0 done; 1 the job failed, with one line why; 2 wrong usage; 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import __version__
from .dtypes import numpy_dtype
from .errors import InputError, MissingExtraError, SparseError

if TYPE_CHECKING:
    from .report import Report
    from .runtime import CompiledModule

# Runs that a report's times are the median of.
_REPEATS = 5

# Nothing here imports TVM or ONNX at the top: `run` needs neither, `--help` answers at once, and
# TVM_NUM_THREADS has to be set before TVM is loaded.


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; by default those of the process.

    Returns
    -------
    int
        The exit code; wrong usage raises SystemExit(2), as argparse does.
    """
    options = build_parser().parse_args(argv)
    if getattr(options, "plan", None) and getattr(options, "force", None):
        options.parser.error("--plan says it all already; --force would contradict it")
    if getattr(options, "plan", None) and getattr(options, "forbid", None):
        options.parser.error("--plan says it all already; --forbid would contradict it")
    try:
        code = _run(options)
        # A pipe that was closed early breaks here, where it can be caught.
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more at its end; that must go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _run(options: argparse.Namespace) -> int:
    if getattr(options, "threads", None):
        os.environ["TVM_NUM_THREADS"] = str(options.threads)
    debug = getattr(options, "debug", False)
    try:
        return int(options.command(options) or 0)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        _complain("stopped")
        return 130
    except SparseError as error:
        if debug:
            raise
        _complain(_one_line(str(error)))
    except Exception as error:
        if debug:
            raise
        text = _one_line(str(error))
        _complain(f"{type(error).__name__}: {text} (--debug shows where)")
    return 1


def _complain(text: str) -> None:
    print(f"tvm-sparse: {text}", file=sys.stderr)


def _one_line(text: str) -> str:
    """Join a short message; of a long one, as TVM writes them, keep the line that says it."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return " ".join(lines) if len(lines) <= 3 else lines[-1]


# ---------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------


def inspect(options: argparse.Namespace) -> None:
    """Print the sparsity of every weight."""
    import tvm_sparse as ts

    report = ts.inspect(options.model if _is_checkpoint(options) else _load(options))
    if options.json == "-":
        print(report.to_json().rstrip())
        return
    print(report)
    if options.json:
        report.to_json(options.json)


def prune(options: argparse.Namespace) -> None:
    """Prune an ONNX file: set its least important weights to zero."""
    from .files import save_onnx
    from .frontends.tensor_files import need_safetensors, save_tensors
    from .pruning import prune_with_report
    from .pruning.onnx_weights import OnnxWeights

    _check_writable(options.output)
    if options.masks:
        need_safetensors(f"writing '{options.masks}'")
        _check_writable(options.masks)
    gradients = read_inputs([("", path) for path in options.gradients], ())
    calibration = read_inputs(options.calibration, _input_names(options)) or None
    model, notes = _with_weights(options)
    report = prune_with_report(
        model,
        options.pattern,
        options.sparsity,
        options.scope,
        options.skip,
        options.seed,
        scores=options.scores,
        gradients=gradients or None,
        calibration=calibration,
        remove_channels=options.remove_channels,
    )
    save_onnx(report.model, options.output)
    if options.masks:
        save_tensors(options.masks, OnnxWeights(report.model).masks())
    print(report)
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {' and '.join(filter(None, (options.output, options.masks)))}")


def _input_names(options: argparse.Namespace) -> list[str]:
    """Name the inputs of the ONNX file; it is read only when calibration inputs need them."""
    if not options.calibration:
        return []
    from .files import read_onnx

    graph = read_onnx(options.model).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [value.name for value in graph.input if value.name not in weights]


def tune(options: argparse.Namespace) -> None:
    """Measure kernels on a model's weights and keep the records."""
    import tvm_sparse as ts

    from .progress import Progress

    if bool(options.tracker) != bool(options.key):
        options.parser.error("--tracker and --key go together")
    _check_writable(options.records)
    if options.report:
        _check_writable(options.report)
        _check_report_name(options.report)
    found = ts.tune(
        _load(options),
        target=options.target,
        trials=options.trials,
        records=options.records,
        tracker=f"{options.tracker}/{options.key}" if options.tracker else None,
        threads=options.threads,
        seconds=options.seconds,
        dense_trials=options.dense_trials,
        progress=Progress(),
    )
    print(found)
    if options.report:
        write_report(found.report, options.report)
    print(f"the records are in {options.records}; compile with --records {options.records}")


def calibrate(options: argparse.Namespace) -> None:
    """Measure what this machine can do, for the plans that are made on it."""
    from .progress import Progress
    from .records import read_records
    from .tuning.calibrate import calibrate as measure

    if options.output:
        _check_writable(options.output)
    records = read_records(options.records) if options.records else None
    found = measure(
        options.target,
        seconds=options.seconds,
        threads=options.threads,
        progress=Progress(),
        path=options.output,
        records=records,
    )
    print(found)
    if not options.output:
        print("plans on this machine use it from now on")


def compile_(options: argparse.Namespace) -> None:
    """Compile a model to a shared library."""
    import tvm_sparse as ts

    from .progress import Progress

    for path in (options.output, options.report, options.save_plan):
        if path:
            _check_writable(path)
    _check_report_name(options.report)
    started = time.perf_counter()
    model = _load(options)
    plan = _plan(ts, model, options)
    module = ts.compile(
        model,
        target=options.target,
        plan=plan,
        records=options.records,
        check=not options.no_check,
        threads=options.threads,
        progress=Progress(),
    )
    module.export(options.output)
    seconds = time.perf_counter() - started
    report = module.report
    if options.report and not options.no_check:
        report = _measured(module)
    print(report)
    if options.report:
        write_report(report, options.report)
    size = os.path.getsize(options.output)
    is_checked = not options.no_check and module.refusal is None
    checked = "checked against the dense model" if is_checked else "not checked"
    print(f"wrote {options.output}: {_bytes(size)}, {checked}, in {seconds:.1f} s")


def package(options: argparse.Namespace) -> None:
    """Put a library and its runtime into a folder that runs without the compiler."""
    from .package_manifest import MANIFEST, sha256_of
    from .packaging import package as pack

    manifest = pack(options.library, options.output, cpp=options.cpp, force=options.force)
    for name, file in manifest.files.items():
        print(f"{_bytes(file.bytes):>10}  {name}")
    total = sum(file.bytes for file in manifest.files.values())
    print(f"wrote {options.output}: {_bytes(total)} in {len(manifest.files)} files")
    print(f"the SHA-256 of its {MANIFEST}: {sha256_of(Path(options.output) / MANIFEST)}")


def _measured(module: CompiledModule) -> Report:
    """Return the report with measured times, where no size of an input has to be guessed."""
    from .reference import random_inputs

    sizes = [dim for spec in module.inputs for dim in spec.shape]
    if module.refusal is not None or not all(isinstance(size, int) for size in sizes):
        return module.report
    return module.profile(*random_inputs(module), repeats=_REPEATS).report or module.report


def run(options: argparse.Namespace) -> None:
    """Run an exported library on arrays from files."""
    from .deploy import load_module

    if options.output:
        _check_writable(options.output)
    module = load_module(options.library, threads=options.threads, verify=options.verify)
    arrays = read_inputs(options.input, [spec.name for spec in module.inputs])
    for spec in module.inputs:
        if spec.name in arrays:
            arrays[spec.name] = as_declared(arrays[spec.name], spec.dtype)
    outputs = module.run(arrays)
    for name, value in outputs.items():
        print(f"{name}: {describe(value)}")
    if options.output:
        save_arrays(options.output, outputs)
        print(f"wrote {options.output}")


def serve(options: argparse.Namespace) -> None:
    """Serve a library or package over HTTP, by the Open Inference Protocol."""
    try:
        from .serving.server import serve as serve_with
        from .serving.settings import Settings
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        raise MissingExtraError(
            f"serving needs {name}, which is not installed: pip install tvm-sparse[serve]"
        ) from None

    given = {key: getattr(options, key) for key in SERVE_OPTIONS}
    sizes = dict(options.max_size)
    serve_with(Settings(options.library, max_sizes=sizes, **given))


def bench(options: argparse.Namespace) -> int:
    """Time a model against its dense peers."""
    from .bench import bench as measure
    from .progress import Progress

    if options.json and options.json != "-":
        _check_writable(options.json)
    model, notes = _with_weights(options)
    result = measure(
        model,
        options.against,
        options.threads or 1,
        target=options.target,
        plan=options.plan,
        records=options.records,
        library=options.library,
        shapes=_shapes(options),
        repeats=options.repeats,
        seconds=options.seconds,
        name=Path(options.model).stem,
        progress=Progress(),
    )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if options.json == "-":
        print(result.to_json().rstrip())
    else:
        print(result)
        if options.json:
            result.to_json(options.json)
    if result.failed:
        _complain("this package has no time of its own; the table says why")
    return 1 if result.failed else 0


def demo(options: argparse.Namespace) -> None:
    """Do the main job on a model made here."""
    from .demo import demo as show

    show(folder=options.output, threads=options.threads or 1, model=options.model)


def cache(options: argparse.Namespace) -> None:
    """List or remove the libraries that sessions keep, or tell where they lie."""
    from .cache import LibraryCache

    store = LibraryCache()
    if options.action == "path":
        print(store.folder)
        return
    if options.action == "clear":
        removed = store.clear()
        print(f"removed {_libraries(len(removed))}, {_bytes(sum(x.size for x in removed))}")
        return
    found = store.entries()
    for library in reversed(found):
        about = library.about
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(library.used))
        what = f"{about.get('model', 'damaged')} for {about.get('target', '?')}"
        threads = f"{about.get('threads', '?')} threads"
        print(f"{library.key[:12]}  {used}  {_bytes(library.size):>10}  {what}, {threads}")
    total = sum(library.size for library in found)
    print(f"{_libraries(len(found))}, {_bytes(total)} of at most {_bytes(store.limit)}")


def _libraries(count: int) -> str:
    return f"{count} {'library' if count == 1 else 'libraries'}"


# ---------------------------------------------------------------------------------------------
# What they share
# ---------------------------------------------------------------------------------------------


def _load(options: argparse.Namespace) -> Any:
    import tvm_sparse as ts

    source: Any = options.model
    if Path(source).suffix == ".pt2":
        from .frontends.torch import open_program

        source = open_program(source)
    return ts.load(source, shapes=_shapes(options), weights=options.weights)


def _is_checkpoint(options: argparse.Namespace) -> bool:
    from .frontends.tensor_files import is_checkpoint

    if not is_checkpoint(options.model):
        return False
    if options.weights or options.shape:
        options.parser.error("a checkpoint has no graph: neither --weights nor --shape fits it")
    return True


def _with_weights(options: argparse.Namespace) -> tuple[Any, tuple[str, ...]]:
    """Return the ONNX file's path, or its model with other weights and sentences about them."""
    if not options.weights:
        return options.model, ()
    from .frontends.onnx_overlay import with_weights

    return with_weights(options.model, options.weights)


def _shapes(options: argparse.Namespace) -> dict[str, tuple[int, ...]] | None:
    return dict(options.shape) or None


def _plan(ts: Any, model: Any, options: argparse.Namespace) -> Any:
    if options.plan:
        plan = ts.Plan.from_json(Path(options.plan))
    elif options.force or options.forbid or options.save_plan:
        plan = ts.plan(
            model,
            target=options.target,
            records=options.records,
            threads=options.threads,
            force=dict(options.force),
            forbid=list(options.forbid),
        )
    else:
        return None
    if options.save_plan:
        plan.to_json(options.save_plan)
    return plan


def _check_report_name(path: str | None) -> None:
    if path and Path(path).suffix.lower() not in (".html", ".json"):
        raise SparseError(f"a report is written as .html or .json, and '{path}' is neither")


def write_report(report: Report, path: str) -> None:
    """Write a report as HTML or JSON, as the file's suffix says.

    Raises
    ------
    SparseError
        When the suffix is another one, or the file cannot be written.
    """
    _check_report_name(path)
    write = report.to_html if Path(path).suffix.lower() == ".html" else report.to_json
    write(path)


def _check_writable(path: str) -> None:
    """Refuse a hopeless output path before the work, not after it."""
    place = Path(path)
    if place.is_dir():
        raise SparseError(f"'{path}' is a folder; a file is to be written")
    if not place.parent.is_dir():
        raise SparseError(f"there is no folder '{place.parent}' to write '{place.name}' to")
    if not os.access(place.parent, os.W_OK):
        raise SparseError(f"the folder '{place.parent}' is not writable")


def _bytes(size: int) -> str:
    if size < 1 << 20:
        return f"{size / 1024:.0f} KiB"
    return f"{size / (1 << 20):.1f} MiB"


def describe(value: np.ndarray) -> str:
    """Sum up an array in a line."""
    head = f"{value.dtype} [{', '.join(map(str, value.shape))}]"
    if not value.size or value.dtype == object:
        return head
    numbers = value.astype(np.float64)
    return f"{head}  min {numbers.min():.6g}  mean {numbers.mean():.6g}  max {numbers.max():.6g}"


def read_inputs(given: Sequence[tuple[str, str]], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """Read ``NAME=FILE`` pairs; a pair without a name stands for all arrays of an .npz file.

    Parameters
    ----------
    wanted : sequence of str
        The model's inputs, for the messages.

    Raises
    ------
    InputError
        When a file cannot be read, or lacks the array.
    """
    if not given and wanted:
        raise InputError(f"the model needs {', '.join(wanted)}: give each as --input NAME=FILE.npy")
    arrays: dict[str, np.ndarray] = {}
    for name, path in given:
        content = _read_arrays(path)
        if not name and isinstance(content, np.ndarray):
            if len(wanted) != 1:
                raise InputError(f"say which input '{path}' is: --input NAME={path}")
            arrays[wanted[0]] = content
        elif isinstance(content, np.ndarray):
            arrays[name] = content
        elif not name:
            arrays.update(content)
        elif name in content:
            arrays[name] = content[name]
        elif len(content) == 1:
            arrays[name] = next(iter(content.values()))
        else:
            raise InputError(f"'{path}' holds {', '.join(content)}, and no '{name}'")
    return arrays


def as_declared(array: np.ndarray, dtype: str) -> np.ndarray:
    """See an array that was read from a file as bfloat16 where that is wanted.

    Files of NumPy know no such type: what is written of it are two bytes an element.
    """
    if dtype == "bfloat16" and array.dtype == np.dtype("V2"):
        return array.view(numpy_dtype(dtype))
    return array


def _read_arrays(path: str) -> np.ndarray | dict[str, np.ndarray]:
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            return {key: content[key] for key in content.files}
    except FileNotFoundError:
        raise InputError(f"there is no file '{path}'") from None
    except Exception as error:
        # What the parsers of NumPy and of zip files raise for bytes that are damaged: errors of
        # their tokenizers, of decompression, of memory that a header claims, and more.
        reason = getattr(error, "strerror", None) or "it is no whole .npy or .npz file of numbers"
        raise InputError(f"'{path}' cannot be read: {reason}") from None


def save_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays under their own names to an .npz file; a single one to .npy where asked for.

    Raises
    ------
    SparseError
        When the file cannot be written, or several arrays are to go to one .npy file.
    """
    from .files import written_beside

    single = Path(path).suffix == ".npy"
    if single and len(arrays) != 1:
        raise SparseError(f"{len(arrays)} outputs do not fit one .npy file; write an .npz")
    with written_beside(path) as temporary, open(temporary, "wb") as stream:
        if single:
            np.save(stream, next(iter(arrays.values())), allow_pickle=False)
            return
        # numpy.savez takes names as keywords, and some of those ("file") are its own.
        with zipfile.ZipFile(stream, "w") as archive:
            for name, value in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(value), allow_pickle=False)


# ---------------------------------------------------------------------------------------------
# The parser
# ---------------------------------------------------------------------------------------------


def _argument(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Turn a refusal of `read` into wrong usage, with its own words."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except (SparseError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _read_shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, equals, sizes = text.rpartition("=")
    parts = sizes.split(",") if sizes else []
    if not (name and equals and all(part.strip().isdecimal() for part in parts)):
        raise ValueError(f"'{text}' is no shape; write NAME=1,128")
    return name, tuple(int(part) for part in parts)


def _read_input(text: str) -> tuple[str, str]:
    name, equals, path = text.rpartition("=")
    if not path or (equals and not name):
        raise ValueError(f"'{text}' names no input; write NAME=FILE.npy")
    return name, path


def _read_force(text: str) -> tuple[str, str]:
    name, equals, chosen = text.rpartition("=")
    if not (name and equals and chosen):
        raise ValueError(f"'{text}' forces nothing; write NAME=FORMAT")
    return name, chosen


def _read_pattern(text: str) -> str:
    from .pruning import parse_pattern

    parse_pattern(text)
    return text


def _read_sparsity(text: str) -> float:
    value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value < 1:
        raise ValueError(f"the sparsity is the share of zeros, from 0 to below 1; {text} is not")
    return value


def _read_count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise ValueError(f"'{text}' is no whole number from 1 on")
    return value


def _read_seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(f"'{text}' is no length of time")
    return value


def _read_port(text: str) -> int:
    value = int(text) if text.isdigit() else -1
    if not 0 <= value < 1 << 16:
        raise ValueError(f"'{text}' is no port, from 0 to 65535")
    return value


def _read_size(text: str) -> tuple[str, int]:
    name, equals, size = text.rpartition("=")
    if not (name and equals):
        raise ValueError(f"'{text}' bounds no size; write NAME=512")
    return name, _read_count(size)


def _read_peers(text: str) -> tuple[str, ...]:
    from .bench import PEERS

    peers = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [peer for peer in peers if peer not in PEERS]
    if unknown:
        raise ValueError(f"unknown peer '{unknown[0]}'; there are {', '.join(PEERS)}")
    return peers


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = argparse.ArgumentParser(
        prog="tvm-sparse",
        description="Compile pruned models to libraries that make use of the zeros.",
    )
    parser.add_argument("--version", action="version", version=f"tvm-sparse {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (function, add_options) in COMMANDS.items():
        text = (function.__doc__ or "").strip()
        command = commands.add_parser(name, help=text, description=text, parents=[common])
        command.set_defaults(command=function, parser=command)
        add_options(command)
    return parser


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    _model(parser, "MODEL.onnx|WEIGHTS.safetensors")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON; - is stdout")


def _prune_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.onnx")
    _weights(parser)
    parser.add_argument("-o", "--output", required=True, metavar="PRUNED.onnx")
    parser.add_argument(
        "--pattern",
        type=_argument(_read_pattern),
        default="unstructured",
        help="unstructured (default), N:M, V:N:M, block:RxC, vector:V, vector:1xV, kernel, "
        "channel, filter, neuron, tile-wise:G or tile-wise:G+R%%",
    )
    parser.add_argument(
        "--sparsity",
        type=_argument(_read_sparsity),
        metavar="S",
        help="share of zeros, 0.9 by default; N:M fixes it",
    )
    parser.add_argument(
        "--scope",
        choices=("global", "layer", "erk", "row"),
        help="rank over all layers together (default), layer by layer, so with densities after the "
        "layers' dimensions, or row by row (default with --scores wanda)",
    )
    parser.add_argument(
        "--scores",
        choices=("magnitude", "taylor", "wanda"),
        default="magnitude",
        help="|w| (default), |w * gradient|, or |w| times the norm of its input",
    )
    parser.add_argument(
        "--gradients",
        action="append",
        default=[],
        metavar="FILE.npz",
        help="for taylor: the gradient of each layer's weight, by the layer's name",
    )
    parser.add_argument(
        "--calibration",
        type=_argument(_read_input),
        action="append",
        default=[],
        metavar="NAME=x.npy",
        help="for wanda: an input to run the model on; FILE.npz alone gives all of its arrays",
    )
    parser.add_argument(
        "--remove-channels",
        action="store_true",
        help="cut output channels that are zero out of the graph, so that the file gets smaller",
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="LAYER", help="leave these alone (pattern)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides between equal scores")
    parser.add_argument(
        "--masks",
        metavar="FILE.safetensors",
        help="also write what is left of each weight as a mask, NAME_mask, for other tools",
    )


def _tune_options(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _target(parser)
    parser.add_argument(
        "--records",
        required=True,
        metavar="FILE",
        help="read first, so that tuning goes on where it stopped; every trial is added",
    )
    parser.add_argument(
        "--trials",
        type=_argument(_read_count),
        default=64,
        metavar="N",
        help="kernels to measure for each distinct workload (64)",
    )
    parser.add_argument(
        "--seconds", type=_argument(_read_seconds), metavar="S", help="start no trial after this"
    )
    parser.add_argument(
        "--dense-trials",
        type=int,
        metavar="N",
        help="MetaSchedule's trials for a layer that stays dense; as many by default, 0 for none",
    )
    fleet = parser.add_argument_group("a fleet of machines")
    fleet.add_argument("--tracker", metavar="HOST:PORT", help="a TVM RPC tracker")
    fleet.add_argument("--key", help="the kind of machine to borrow from it")
    parser.add_argument("--report", metavar="FILE.json|FILE.html", help="write the report")
    _threads(parser)


def _calibrate_options(parser: argparse.ArgumentParser) -> None:
    _target(parser)
    parser.add_argument(
        "--seconds", type=_argument(_read_seconds), default=60.0, metavar="S", help="60 by default"
    )
    parser.add_argument(
        "--records", metavar="FILE", help="tuning records of this machine, to learn from as well"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="write here instead of where plans look"
    )
    _threads(parser)


def _compile_options(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("-o", "--output", required=True, metavar="model.so")
    _target(parser)
    parser.add_argument("--records", metavar="FILE", help="tuning records")
    decided = parser.add_argument_group("the plan")
    decided.add_argument("--plan", metavar="FILE", help="use this plan instead of making one")
    decided.add_argument("--save-plan", metavar="FILE", help="write the plan that was used")
    decided.add_argument(
        "--force",
        type=_argument(_read_force),
        action="append",
        default=[],
        metavar="NAME=FORMAT",
        help="pack these layers (a name or pattern) in this format",
    )
    decided.add_argument(
        "--forbid", action="append", default=[], metavar="PATTERN", help="keep these layers dense"
    )
    parser.add_argument("--report", metavar="FILE.json|FILE.html", help="write the report")
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare with the dense model"
    )
    _threads(parser)


def _package_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("library", metavar="model.so")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER")
    parser.add_argument(
        "--cpp", action="store_true", help="also put headers and an example for C++ into cpp/"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a folder that is not a package"
    )


def _library(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("library", metavar="model.so", help="a library, or a package's folder")
    parser.add_argument(
        "--verify",
        nargs="?",
        const=True,
        default=False,
        metavar="MANIFEST|SHA-256",
        help="refuse files that differ from the manifest.json beside them, from another one, or "
        "from this hash (of a library, or of a folder's manifest.json); loading a library runs its "
        "code",
    )


def _serve_options(parser: argparse.ArgumentParser) -> None:
    _library(parser)
    count = _argument(_read_count)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=_argument(_read_port), default=8000)
    parser.add_argument(
        "--name", default="", help="what clients call the model; by default as the file is called"
    )
    parser.add_argument(
        "--workers", type=count, default=1, metavar="N", help="processes that share the port (1)"
    )
    parser.add_argument(
        "--instances",
        type=count,
        metavar="N",
        help="calls at the same time in each worker; by default the cores, divided by workers and "
        "threads",
    )
    together = parser.add_argument_group("requests that are put together")
    together.add_argument(
        "--max-batch", type=count, default=1, metavar="N", help="up to so many rows (1: none are)"
    )
    together.add_argument(
        "--max-delay-ms",
        type=_argument(_read_seconds),
        default=2.0,
        metavar="MS",
        help="how long a request waits for others (2)",
    )
    limits = parser.add_argument_group("limits of each worker")
    limits.add_argument(
        "--max-queue", type=count, default=128, metavar="N", help="requests at the same time (128)"
    )
    limits.add_argument(
        "--max-request-bytes",
        type=count,
        default=16 << 20,
        metavar="B",
        help="the longest body (16777216)",
    )
    limits.add_argument(
        "--max-size",
        type=_argument(_read_size),
        action="append",
        default=[],
        metavar="NAME=N",
        help="the largest value of a symbolic size",
    )
    limits.add_argument(
        "--timeout",
        type=_argument(_read_seconds),
        default=60.0,
        metavar="S",
        help="for a body to arrive, and then for the answer (60)",
    )
    limits.add_argument(
        "--grace",
        type=_argument(_read_seconds),
        default=25.0,
        metavar="S",
        help="for requests to end after SIGTERM (25)",
    )
    _threads(parser)


def _run_options(parser: argparse.ArgumentParser) -> None:
    _library(parser)
    parser.add_argument(
        "--input",
        type=_argument(_read_input),
        action="append",
        default=[],
        metavar="NAME=x.npy",
        help="an input, from an .npy or .npz file; FILE.npz alone gives all of its arrays",
    )
    parser.add_argument("--output", metavar="out.npz", help="write the outputs")
    _threads(parser)


def _bench_options(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument(
        "--against",
        type=_argument(_read_peers),
        default=("onnxruntime", "openvino", "tvm"),
        metavar="PEER,...",
        help="onnxruntime, openvino, tvm (these three by default), tvm-stock",
    )
    _target(parser)
    parser.add_argument("--plan", metavar="FILE")
    parser.add_argument("--records", metavar="FILE")
    parser.add_argument("--library", metavar="model.so", help="time this instead of compiling")
    parser.add_argument("--repeats", type=_argument(_read_count), metavar="N", help="rounds")
    parser.add_argument(
        "--seconds", type=_argument(_read_seconds), default=10.0, help="time for the rounds"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; - is stdout")
    _threads(parser)


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("encoder", "mobilenet"), default="encoder")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="keep the files that it makes")
    _threads(parser)


def _weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        metavar="FILE.safetensors",
        help="lay these over the model's weights, by name (or the folder or index of several "
        "files); masks alone set to zero what they hide",
    )


def _cache_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "clear", "path"))


def _model(parser: argparse.ArgumentParser, metavar: str = "MODEL.onnx") -> None:
    parser.add_argument("model", metavar=metavar)
    _weights(parser)
    parser.add_argument(
        "--shape",
        type=_argument(_read_shape),
        action="append",
        default=[],
        metavar="NAME=1,128",
        help="fix the shape of an input",
    )


def _target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        default="native",
        metavar="T",
        help="native (default), x86-64-v2, x86-64-v3, x86-64-v4, or a TVM target as JSON",
    )


def _threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_argument(_read_count), metavar="N")


# What `serve` passes on as it is.
SERVE_OPTIONS = (
    "name",
    "host",
    "port",
    "workers",
    "threads",
    "instances",
    "max_batch",
    "max_delay_ms",
    "max_queue",
    "max_request_bytes",
    "timeout",
    "grace",
    "verify",
)

COMMANDS: Mapping[
    str,
    tuple[Callable[[argparse.Namespace], int | None], Callable[[argparse.ArgumentParser], None]],
] = {
    "inspect": (inspect, _inspect_options),
    "prune": (prune, _prune_options),
    "tune": (tune, _tune_options),
    "calibrate": (calibrate, _calibrate_options),
    "compile": (compile_, _compile_options),
    "package": (package, _package_options),
    "run": (run, _run_options),
    "serve": (serve, _serve_options),
    "bench": (bench, _bench_options),
    "demo": (demo, _demo_options),
    "cache": (cache, _cache_options),
}
