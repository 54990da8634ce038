"""The Markdown table of the speed comparison: a section for each level."""

from sit_atconv.speed.results import DEFINITIONS, Comparison, Measurement, growth
from sit_atconv.speed.timing import Rounds

LEFT = ("dtype", "form", "what")  # columns of words, aligned left


def table(comparison: Comparison) -> str:
    """Returns medians with quartiles in brackets, and the definitions of the figures."""
    options, checks = comparison.options, comparison.agreement
    errors = [check["error"] for check in checks if check["error"] is not None]
    lines = [
        f"# Speed of {comparison.title}",
        "",
        f"{comparison.where}. {len(errors)} checks that the forms compute the right values passed; the largest "
        f"relative error was {max(errors, default=0):.1g}.",
        *(f"Not checked: {what}." for what in dict.fromkeys(c["what"] for c in checks if c["error"] is None)),
    ]
    for level in options.levels:
        rows = [m for m in comparison.measurements if m.level == level]
        lines += ["", f"## {level}", ""]
        if level == "sampling":
            decoder = {"none": "not decoded", "sd-vae": "decoded by the SD-VAE's architecture with random weights"}
            lines += [
                f"{options.steps} Euler steps, cfg {options.cfg:g}; "
                f"{decoder.get(options.decoder, f'decoded by {options.decoder}')}.",
                "",
            ]
        lines += _rows(rows, options.baseline) + _growth(rows)
    names = {
        "multiply_adds": "GMACs",
        "over_floor": "x floor",
        "over_byte_floor": "x byte floor",
        "over_flow": "x flow step",
        "peak_memory_bytes": "peak memory",
    }
    keys = [
        *(key for key in DEFINITIONS if set(key.split(", ")) & set(options.levels)),
        "multiply_adds",
        "speedup",
        "over_floor",
        *(["over_byte_floor"] if "op" in options.levels else []),
        *(["over_flow"] if "train-jump" in options.levels else []),
        "peak_memory_bytes",
    ]
    return "\n".join([*lines, "", *(f"- {names.get(key, key)}: {DEFINITIONS[key]}." for key in keys)])


def _rows(rows: list[Measurement], baseline: str) -> list[str]:
    """Returns the lines of a table, without empty columns."""
    columns = {
        "px": lambda m: f"{m.resolution}",
        "dtype": lambda m: m.dtype,
        "batch": lambda m: f"{m.batch_size}",
        "form": lambda m: m.form,
        "what": lambda m: m.quantity,
        "parameters": lambda m: f"{m.parameters:,}" if m.parameters else "",
        "GMACs / image": lambda m: "" if m.multiply_adds is None else f"{m.multiply_adds / 1e9:.4g}",
        "ms": lambda m: _cell(m.milliseconds, ".4g"),
        "images/s": lambda m: _cell(m.images_per_second, ".4g"),
        f"speedup over {baseline}": lambda m: _cell(m.speedup),
        "x floor": lambda m: _cell(m.over_floor),
        "x byte floor": lambda m: _cell(m.over_byte_floor),
        "x flow step": lambda m: _cell(m.over_flow),
        "peak memory, MiB": lambda m: "" if m.peak_memory_bytes is None else f"{m.peak_memory_bytes / 2**20:.1f}",
    }
    if rows[0].level in ("op", "mixer", "block"):
        del columns["images/s"]
    cells = {name: column for name, text in columns.items() if any(column := [text(m) for m in rows])}
    return [
        f"| {' | '.join(cells)} |",
        f"|{'|'.join('---' if name in LEFT else '---:' for name in cells)}|",
        *(f"| {' | '.join(row)} |" for row in zip(*cells.values(), strict=True)),
    ]


def _cell(rounds: Rounds | None, form: str = ".2f") -> str:
    return "" if rounds is None else f"{rounds.median:{form}} ({rounds.q1:{form}}-{rounds.q3:{form}})"


def _growth(rows: list[Measurement]) -> list[str]:
    lines = []
    for quantity, dtype in dict.fromkeys((m.quantity, m.dtype) for m in rows):
        forms: dict[str, list[Measurement]] = {}
        for m in rows:
            if (m.quantity, m.dtype) == (quantity, dtype):
                forms.setdefault(m.form, []).append(m)
        powers = [f"{form} {power:.2f}" for form, points in forms.items() if (power := growth(points)) is not None]
        lines += [f"- {quantity}, {dtype}: {', '.join(powers)}"] if powers else []
    return ["", "Time per image grows as the number of tokens to the power of:", "", *lines] if lines else []
