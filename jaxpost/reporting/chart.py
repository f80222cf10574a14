"""Line charts as SVG, drawn by hand: enough for a report that needs no script and no library."""

import math

_WIDTH, _HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 62, 12, 28
_POINTS = 400  # the most points of a line, about one for each pixel of the chart's width


def draw(lines, colours, bands=None):
    """An SVG line chart of {stage: [(step, value or None)]}; each line ends in a dot with its last value beside it.

    bands: {stage: [(step, low, high)]}, shaded behind the lines.
    """
    bands = bands or {}
    points = [(x, y) for line in lines.values() for x, y in line if y is not None]
    points += [(x, y) for band in bands.values() for x, *ends in band for y in ends] if points else []
    if not points:
        return '<p class="note">never finite</p>'
    xs, ys = _ticks(*_range(x for x, _ in points)), _ticks(*_range(y for _, y in points))
    x0, x1, y0, y1 = xs[0], xs[-1], ys[0], ys[-1]
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(x, y):
        return _LEFT + (x - x0) / (x1 - x0) * (right - _LEFT), bottom - (y - y0) / (y1 - y0) * (bottom - _TOP)

    parts = [f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for tick, name in zip(ys, _names(ys), strict=True):
        _, y = place(x0, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
    for tick in xs:
        x, _ = place(tick, y0)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{label(tick)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    ends = []
    for stage, band in bands.items():
        corners = [*((x, high) for x, _, high in band), *((x, low) for x, low, _ in reversed(band))]
        outline = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in corners)
        parts.append(f'<polygon points="{outline}" fill="{colours[stage]}" fill-opacity="0.15"/>')
    for stage, line in lines.items():
        parts.append(f'<path d="{_path(_thin(line), place)}" fill="none" stroke="{colours[stage]}" stroke-width="1.6"/>')
        last = next((x, y) for x, y in reversed(line) if y is not None)
        ends.append((*place(*last), last[1], colours[stage]))
    return "".join([*parts, *_end_labels(ends), "</svg>"])


def _path(line, place):
    """The line as SVG path commands; it is broken where a value is missing."""
    commands, pen = [], "M"
    for x, y in line:
        if y is None:
            pen = "M"
        else:
            commands.append("{}{:.1f} {:.1f}".format(pen, *place(x, y)))
            pen = "L"
    return "".join(commands)


def _end_labels(ends):
    """Dots at the lines' ends, given as (x, y, value, colour), and the values in the right margin, kept apart."""
    parts = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y, _, colour in ends]
    ends = sorted(ends, key=lambda end: end[1])
    heights = [y + 4 for _, y, _, _ in ends]
    for number in range(1, len(ends)):
        heights[number] = max(heights[number], heights[number - 1] + 12)
    # Labels pushed below the axis would cover its ticks, so they are pushed back up.
    limit = _HEIGHT - _BOTTOM + 4
    for number in reversed(range(len(ends))):
        heights[number] = min(heights[number], limit)
        limit = heights[number] - 12
    for (_, _, value, colour), y in zip(ends, heights, strict=True):
        parts.append(f'<text x="{_WIDTH - _RIGHT + 8}" y="{y:.1f}" style="fill: {colour}">{label(value)}</text>')
    return parts


def _thin(line):
    """At most about `_POINTS` of the line's points: the lowest and the highest of each stretch, to keep spikes."""
    if len(line) <= _POINTS:
        return line
    size = math.ceil(2 * len(line) / _POINTS)
    kept = {0, len(line) - 1}
    for start in range(0, len(line), size):
        finite = [number for number in range(start, min(start + size, len(line))) if line[number][1] is not None]
        # A stretch without a value keeps its first point, which breaks the line there.
        kept |= {min(finite, key=lambda n: line[n][1]), max(finite, key=lambda n: line[n][1])} if finite else {start}
    return [line[number] for number in sorted(kept)]


def _range(values):
    """(lowest, highest), widened where they are equal."""
    values = list(values)
    low, high = min(values), max(values)
    margin = abs(low) * 0.1 or 0.5
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high)) else (low - margin, high + margin)


def _ticks(low, high):
    """A few round numbers that enclose [low, high], in equal steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [number * step for number in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _names(ticks):
    """The ticks' labels; where they would be equal, the differences from the first."""
    names = [label(tick) for tick in ticks]
    if len(set(names)) == len(names):
        return names
    return [names[0], *(f"+{tick - ticks[0]:.2g}" for tick in ticks[1:])]


def label(value):
    """A figure with four significant digits; whole numbers have no decimals."""
    if value is None:
        return "&ndash;"
    if abs(value) < 1e7 and (float(value).is_integer() or abs(value) >= 1000):
        return f"{value:.0f}"
    return f"{value:.2g}" if abs(value) < 1e-3 else f"{value:.4g}"
