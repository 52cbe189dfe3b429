"""The commands: what they are called with, and what they say. What they do is in peft_s0 and beside this file."""

from __future__ import annotations

import functools
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from .program import Program, find_script

_Command = TypeVar("_Command", bound=Callable[..., Any])

_HELP = """
Adapters of S0 tuning on the command line.

ADAPTER is a folder, or the id of a repository on the Hugging Face Hub.

Exit codes: 0 all is well; 1 bad input, with one line on stderr that says what is wrong; 2 wrong usage. diff, run and
train have their own, which their help says.
"""

app = typer.Typer(
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text, which is the same in every terminal, and quicker
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


class Format(str, Enum):
    """File formats of others."""

    S0_TUNING = "s0-tuning"
    RWKV = "rwkv"


class Engine(str, Enum):
    """What states are written for."""

    S0_TUNING = "s0-tuning"
    RWKV = "rwkv"
    LLAMA_CPP = "llama.cpp"


class Switch(str, Enum):
    """A setting of llama-server."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Dtype(str, Enum):
    """What RWKV's states are written in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class ModelDtype(str, Enum):
    """What a base model's weights are loaded in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or Hub id of a saved S0 adapter.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Subfolder = Annotated[str | None, typer.Option(help="Folder below it that holds the files.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code of the base model's repository, to make its modules.")
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        "-b",
        help="Folder or Hub id of the base model, of which the config alone is read. Default: the adapter's own.",
    ),
]


def _say(kind: str, message: object) -> None:
    typer.echo(f"peft-s0: {kind}: {' '.join(str(message).split())}", err=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of this package in a line each; none of other packages' remarks to programmers."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for warning in caught:
                if warning.category is UserWarning:
                    _say("warning", warning.message)


def _reports_errors(code: int = 1) -> Callable[[_Command], _Command]:
    """Let a command end in one line and an exit code for what is wrong with its input, without a traceback."""

    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def reporting(*args: Any, **kwargs: Any) -> None:
            try:
                with _quiet():
                    command(*args, **kwargs)
            # Also what transformers and the Hub's client raise for names and files that are not there.
            except (ValueError, TypeError, OSError, ImportError) as error:
                _say("error", error)
                raise typer.Exit(code) from None

        return reporting  # type: ignore[return-value]

    return decorate


def _hub_options(revision: str | None, subfolder: str | None) -> dict[str, str]:
    options = {"revision": revision, "subfolder": subfolder}
    return {name: value for name, value in options.items() if value is not None}


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"peft-s0 {version('peft-s0')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


_INSPECT = """
\b
Examples:
  peft-s0 inspect my-task
  peft-s0 inspect me/my-task --revision v1 --json
  peft-s0 inspect my-task --plot norms.png
"""


@app.command(short_help="What is in an adapter.", epilog=_INSPECT)
@_reports_errors()
def inspect(
    adapter: Adapter,
    base_model: BaseModel = None,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the norms as a heat map of layers and heads; a file.")] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    trust_remote_code: Trust = False,
) -> None:
    """Say what is in an adapter: its config, its layers, and how large the states of their heads are.

    Norms are Frobenius norms of a head's state, unscaled as it is stored; a low-rank state is multiplied out, for which
    the base model's config is needed.
    """
    from .reports import draw_norms, inspection, read, show_inspection

    found = inspection(read(adapter, base_model, trust_remote_code, **_hub_options(revision, subfolder)))
    if plot is not None:
        draw_norms(found, plot)
    typer.echo(json.dumps(found, indent=2) if as_json else show_inspection(found))


_DIFF = """
Exit codes: 0 the adapters are the same, bit for bit; 1 they are not; 2 they cannot be compared, or wrong usage.

\b
Examples:
  peft-s0 diff my-task my-task-seed-1
  peft-s0 diff my-task me/my-task --json
"""


@app.command(short_help="How two adapters differ.", epilog=_DIFF)
@_reports_errors(code=2)
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="Folder or Hub id of a saved S0 adapter.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    base_model: BaseModel = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Compare two adapters: the fields of their configs that differ, and layer by layer how far apart the states are.

    States are compared unscaled, as they are stored: the norm of their difference relative to that of A, and the cosine
    of the angle between them. Of the config, the base model's name, versions and what PEFT records of classes do not
    count.
    """
    from .reports import compare, read, show_comparison

    found = compare(read(first, base_model, trust_remote_code), read(second, base_model, trust_remote_code))
    typer.echo(json.dumps(found, indent=2) if as_json else show_comparison(found))
    if not found["same"]:
        raise typer.Exit(1)


_IMPORT = """
\b
Examples:
  peft-s0 import JackYoung27/s0-tuning-qwen3.5-4b-humaneval -b Qwen/Qwen3.5-4B -o humaneval
  peft-s0 import state.pth -b fla-hub/rwkv7-1.5B-world -o my-task
"""


@app.command("import", short_help="Make an adapter of another program's states.", epilog=_IMPORT)
@_reports_errors()
def import_(
    source: Annotated[
        str, typer.Argument(help="Folder or Hub id of the s0-tuning library's files, or a .pth file of RWKV.")
    ],
    base_model: Annotated[
        str,
        typer.Option(
            "--base-model",
            "-b",
            help="Folder or Hub id of the base model, of which the config alone is read.",
            show_default=False,
        ),
    ],
    output: Output,
    form: Annotated[
        Format | None, typer.Option("--format", help="Default: rwkv for a .pth file, s0-tuning for all else.")
    ] = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    trust_remote_code: Trust = False,
) -> None:
    """Make an adapter of states of another program: the s0-tuning library of the paper's authors, or RWKV's time_state.

    docs/importing.md says what becomes of what. Nothing is written unless all of it fits the base model.
    """
    from peft_s0.convert import import_rwkv, import_s0_tuning

    how: dict[str, Any] = {"overwrite": overwrite, "trust_remote_code": trust_remote_code}
    options: dict[str, Any] = _hub_options(revision, subfolder)
    if form is Format.RWKV or (form is None and source.endswith(".pth")):
        if options:
            raise typer.BadParameter("--revision and --subfolder are for the Hub; RWKV's .pth must be a local file.")
        import_rwkv(source, output, base_model, **how)
    else:
        import_s0_tuning(source, output, base_model, **how, **options)
    typer.echo(f"{output}")


_EXPORT = """
\b
Examples:
  peft-s0 export my-task -o for-s0-tuning
  peft-s0 export me/rwkv-task -o state.pth --dtype bfloat16
  peft-s0 export my-task -o slots/my-task.slot --gguf qwen3.5-4b.gguf --prefix "<|im_start|>"

A slot of llama-server needs gguf and llama-cpp-python; docs/llama-cpp.md says how it is restored.
"""


@app.command(short_help="Write states for another program.", epilog=_EXPORT)
@_reports_errors()
def export(
    adapter: Adapter,
    output: Output,
    form: Annotated[
        Engine | None,
        typer.Option(
            "--format",
            help="Default: llama.cpp with --gguf, rwkv if OUTPUT is a .pth file, s0-tuning for all else.",
        ),
    ] = None,
    base_model: BaseModel = None,
    dtype: Annotated[Dtype, typer.Option(help="Of RWKV's states; bfloat16 rounds.")] = Dtype.FLOAT32,
    gguf: Annotated[Path | None, typer.Option(help="For llama.cpp: the model; of a split one, the first part.")] = None,
    prefix: Annotated[
        str | None, typer.Option(help="For llama.cpp: what all prompts begin with. Default: the tokenizer's BOS.")
    ] = None,
    flash_attn: Annotated[Switch, typer.Option(help="For llama.cpp: as the server's.")] = Switch.AUTO,
    cache_type_k: Annotated[str, typer.Option(help="For llama.cpp: as the server's.")] = "f16",
    cache_type_v: Annotated[str, typer.Option(help="For llama.cpp: as the server's.")] = "f16",
    overwrite: Overwrite = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write an adapter's states for another program.

    A folder for the s0-tuning library, a .pth file for RWKV, or a slot of llama-server. docs/importing.md and
    docs/llama-cpp.md say what becomes of what, and what has no place there.
    """
    if (gguf is None and (form is Engine.LLAMA_CPP or prefix is not None)) or (
        gguf is not None and form not in (None, Engine.LLAMA_CPP)
    ):
        raise typer.BadParameter("--format llama.cpp and --gguf go together: its states are laid out as a GGUF says.")
    how: dict[str, Any] = {"overwrite": overwrite, "trust_remote_code": trust_remote_code}
    how |= _hub_options(revision, subfolder)
    if gguf is not None:
        from peft_s0.export.llama_cpp import CacheSettings, write_slot

        flash = {Switch.AUTO: None, Switch.ON: True, Switch.OFF: False}[flash_attn]
        cache = CacheSettings(flash, cache_type_k, cache_type_v)
        try:
            write_slot(adapter, gguf, output, prefix, cache=cache, base_model=base_model, **how)
        except RuntimeError as error:
            raise ValueError(error) from error
        typer.echo(f"{output}")
        return
    import torch

    from peft_s0.convert import export_rwkv, export_s0_tuning

    if form is Engine.RWKV or (form is None and output.suffix == ".pth"):
        export_rwkv(adapter, output, base_model, dtype=getattr(torch, dtype.value), **how)
    else:
        export_s0_tuning(adapter, output, base_model, **how)
    typer.echo(f"{output}")


_SOUP = """
\b
Examples:
  peft-s0 soup seed-0 seed-1 seed-2 -o mean
  peft-s0 soup right one-line --weights 0.7,0.3 -o mixture
"""


@app.command(short_help="Make an adapter of a weighted sum of others.", epilog=_SOUP)
@_reports_errors()
def soup(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Folders or Hub ids of saved S0 adapters.")
    ],
    output: Output,
    weights: Annotated[
        str | None, typer.Option(help="A number for each adapter, with commas between them. Default: their mean.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make an adapter that starts from a weighted sum of the states of others, from their files alone."""
    numbers = _numbers("--weights", weights)
    from peft_s0.soups import soup as make

    make(adapters, numbers, output, overwrite=overwrite)
    typer.echo(f"{output}")


def _numbers(option: str, text: str | None) -> list[float] | None:
    """Numbers with commas between them."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{option} takes numbers with commas between them, such as 0.7,0.3; got {text!r}."
        ) from None


_RUN = """
\b
Examples:
  peft-s0 run evaluate.py --adapter my-task
  peft-s0 run lm_eval --model hf --model_args pretrained=Qwen/Qwen3.5-4B,peft=my-task --tasks gsm8k
  peft-s0 run -m lm_eval --model hf --model_args pretrained=Qwen/Qwen3.5-4B,peft=my-task --tasks gsm8k

\b
`python -m peft_s0` is the same as `peft-s0`, for launchers that start modules in processes of their own:
  torchrun --nproc-per-node 8 -m peft_s0 run evaluate.py
  accelerate launch -m peft_s0 run evaluate.py

S0 is registered in this process and in those that it forks. A process that it starts anew (subprocess, multiprocessing
with "spawn", a launcher) is another interpreter, which knows S0 only if its own program imports peft_s0, or if it is
started as `python -m peft_s0 run` itself. Engines that read adapters by themselves, such as vLLM's LoRA, do not ask
PEFT and are not helped.

Exit code: that of the program.
"""


@app.command(
    short_help="Run another program with S0 registered.",
    epilog=_RUN,
    context_settings={"allow_interspersed_args": False},
)
@_reports_errors()
def run(
    program: Annotated[
        str,
        typer.Argument(metavar="SCRIPT", help="A script, a command that is written in Python, or with -m a module."),
    ],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments, as they are.")] = None,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module, as behind python -m.")] = False,
) -> None:
    """Run another program in Python that loads S0 adapters but does not know of S0.

    PEFT finds S0 in a process once peft_s0 is imported there. This imports it, and then runs the program as the
    interpreter would, with its own arguments, search path and exit code.
    """
    raise Program(program if module else find_script(program), arguments or [], module)


_CALIBRATE = """
\b
Examples:
  peft-s0 calibrate my-task held-out.jsonl
  peft-s0 calibrate my-task held-out.jsonl --grid 0.03,0.07,0.15 --plot alpha.png -o my-task-calibrated

Needs TRL: pip install 'peft-s0[trl]'. The data must be others than those that the states were trained on.
"""


@app.command(short_help="Choose alpha by held-out data.", epilog=_CALIBRATE)
@_reports_errors()
def calibrate(
    adapter: Adapter,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help='One {"prompt": ..., "completion": ...} a line, text or messages; or a Hub dataset.'
        ),
    ],
    split: Annotated[str, typer.Option(help="Of a dataset on the Hub.")] = "test",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save the adapter with the alpha that was chosen.")
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="Alphas to try, with commas. Default: a quarter to four times the adapter's own.")
    ] = None,
    per_layer: Annotated[int, typer.Option(help="Passes over single layers afterwards.", min=0)] = 0,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.", min=1)] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens of a row that count.", min=1)] = 2048,
    dtype: Annotated[ModelDtype, typer.Option(help="Of the base model's weights.")] = ModelDtype.AUTO,
    plot: Annotated[Path | None, typer.Option(help="Draw the loss over alpha; a file.")] = None,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    base_model: Annotated[
        str | None, typer.Option("--base-model", "-b", help="Folder or Hub id. Default: the adapter's own.")
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    trust_remote_code: Trust = False,
) -> None:
    """Choose the scale of an adapter's states by the loss on held-out completions: one evaluation for each alpha.

    The model is loaded and nothing is trained. Rows are made of the data as TRL makes them for training.
    """
    numbers = _numbers("--grid", grid)
    _require_trl("calibrate")
    from peft_s0.convert import ADAPTER_FILES
    from peft_s0.files import check_place

    from . import calibration

    if output is not None:
        check_place(output, overwrite, ADAPTER_FILES)
    if plot is not None and not plot.absolute().parent.is_dir():
        raise FileNotFoundError(f"--plot {plot}: there is no folder '{plot.parent}' to draw into.")
    options = _hub_options(revision, subfolder)
    model, found = calibration.calibrate(
        adapter,
        data,
        split,
        base_model,
        numbers,
        per_layer,
        batch_size,
        max_length,
        dtype.value,
        trust_remote_code,
        options,
    )
    # The picture last: whatever keeps it from being drawn, nothing that was computed is lost.
    if output is not None:
        calibration.save(model, output, overwrite)
    typer.echo(found.to_json() if as_json else str(found))
    if plot is not None:
        found.plot(plot)


_SERVE = """
\b
Examples:
  peft-s0 serve Qwen/Qwen3.5-4B --tasks my-tasks
  peft-s0 serve Qwen/Qwen3.5-4B --task sql=me/qwen3.5-4b-sql --task chat=runs/chat --port 8080
\b
  curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
    -d '{"model": "sql", "prompt": "def f(x):", "max_tokens": 32}'

Needs FastAPI and uvicorn: pip install 'peft-s0[serve]'. Whoever reaches the port may ask; there is no authentication.
"""


@app.command(short_help="Serve many adapters of one model over HTTP.", epilog=_SERVE)
@_reports_errors()
def serve(
    base_model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of the base model.")],
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=ADAPTER", help="A task and the folder or Hub id of its adapter; may be repeated."),
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="A folder with an adapter in each folder, which name tasks.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the base model is called. Default: the end of MODEL.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for one that is free.", min=0, max=65535)] = 8000,
    capacity: Annotated[int, typer.Option(help="How many tasks the device holds.", min=1)] = 32,
    rows: Annotated[int, typer.Option(help="How many requests run at a time.", min=1)] = 32,
    queue: Annotated[int, typer.Option(help="How many wait; further ones are refused with status 503.", min=1)] = 256,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a prompt and its answer. Default: what the model's config says.", min=2),
    ] = None,
    dtype: Annotated[ModelDtype, typer.Option(help="Of the base model's weights.")] = ModelDtype.AUTO,
    trust_remote_code: Trust = False,
) -> None:
    """Serve many adapters of one model over HTTP, as OpenAI's API has it; the model's name selects the task.

    Requests for different tasks run in one batch. docs/serving-http.md says what is served, and what refused.
    """
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"serve needs {package}: pip install 'peft-s0[serve]'")
    places = {}
    for given in task or []:
        task_name, sign, adapter = given.partition("=")
        if not (task_name and sign and adapter):
            raise typer.BadParameter(f"--task takes NAME=ADAPTER, got {given!r}.")
        if task_name in places:
            raise typer.BadParameter(f"--task {task_name} is there twice.")
        places[task_name] = adapter
    from . import serving

    if tasks is not None:
        places |= serving.find_tasks(tasks, places)
    app_name = name or base_model.rstrip("/").rpartition("/")[2]
    engine = serving.make_engine(
        base_model, places, app_name, capacity, rows, queue, max_length, dtype.value, trust_remote_code
    )
    serving.run(engine, app_name, host, port)


_TRAIN = """
\b
Examples:
  peft-s0 train                     # the tiny model that comes along, half a minute on a CPU
  peft-s0 train --model_name_or_path Qwen/Qwen3.5-4B --dataset_name solutions.jsonl --output_dir my-task
  peft-s0 train -- --help           # all options

Needs TRL: pip install 'peft-s0[trl]'. On several devices: torchrun -m peft_s0 train ...

Exit code: that of the script, 1 if it raises.
"""


@app.command(
    short_help="Tune states on a dataset.",
    epilog=_TRAIN,
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
)
@_reports_errors()
def train(arguments: Annotated[list[str] | None, typer.Argument(help="Options of examples/sft.py.")] = None) -> None:
    """Tune states on a dataset: examples/sft.py, TRL's script for supervised tuning with S0's options.

    Its defaults are the paper's recipe.
    """
    _require_trl("train")
    raise Program(str(_find_example("sft.py")), arguments or [], False)


def _require_trl(command: str) -> None:
    if importlib.util.find_spec("trl") is None:
        raise ImportError(f"{command} needs TRL: pip install 'peft-s0[trl]'")


def _find_example(name: str) -> Path:
    """A script of examples/: beside the package in a checkout, in it where it was installed from a wheel.

    Raises:
        OSError: if it is not there.
    """
    package = importlib.util.find_spec("peft_s0")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent
    for place in (folder / "examples", folder.parent / "examples"):
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(f"This installation has no examples/{name}; install peft-s0 from a wheel or a checkout.")
