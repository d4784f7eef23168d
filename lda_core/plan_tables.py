"""The plan as tables, for people."""

from rich.console import Console
from rich.table import Table

from lda_core.device_plan import Plan
from lda_core.memory import GIB


def show(made: Plan, console: Console) -> None:
    """Prints the tables, the token budget and the notes."""
    console.print(_models_table(made), _memory_table(made), _rows_table(made))
    console.print(f"token budget: {made.kv_tokens:,}", highlight=False)
    for notice in made.notices:
        console.print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)


def _models_table(made: Plan) -> Table:
    table = Table(title="Models")
    for heading in ("", "model", "dtype"):
        table.add_column(heading, overflow="fold")
    for heading in ("weights, GiB", "KV, KiB per token"):
        table.add_column(heading, justify="right")
    for model in made.models:
        sizes = _gib(model.weights), _kib(model.kv_per_token)
        table.add_row(model.role, model.source, model.dtype, *sizes)
    table.add_section()
    weights = sum(model.weights for model in made.models)
    kv_per_token = sum(model.kv_per_token for model in made.models)
    table.add_row("both", "", "", _gib(weights), _kib(kv_per_token))
    return table


def _memory_table(made: Plan) -> Table:
    table = Table(title="Memory, GiB")
    table.add_column("")
    columns = []
    for device in made.devices:
        table.add_column(device.holds, justify="right")
        b = device.budget
        kv = b.kv_per_token * b.kv_tokens
        used = device.reserve + b.weights + b.activations + b.prefix_pool + kv
        columns.append(
            (device.reserve, b.weights, b.activations, b.prefix_pool, kv, device.total - used)
        )
    names = ("reserved", "weights", "activations", "prefix pool", "keys and values", "spare")
    for name, *sizes in zip(names, *columns, strict=True):
        table.add_row(name, *map(_gib, sizes))
    table.add_section()
    table.add_row("total", *(_gib(device.total) for device in made.devices))
    return table


def _rows_table(made: Plan) -> Table:
    table = Table(title=f"Rows that fit (max_slots {made.max_slots})")
    headings = ("tokens", "prompt", "new", "each its own prompt", f"{made.samples} of each prompt")
    for heading in headings:
        table.add_column(heading, justify="right")
    for at in made.rows:
        table.add_row(*(f"{n:,}" for n in (at.length, at.prompt, at.new, at.alone, at.shared)))
    return table


def _gib(n: int) -> str:
    return f"{n / GIB:,.2f}"


def _kib(n: int) -> str:
    return f"{n / 1024:,.1f}"
