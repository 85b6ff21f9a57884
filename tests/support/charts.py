"""Read the shapes of a chart."""

from questpress.pipeline.report.charts import Chart, Shape


def shapes(chart: Chart, css: str, drawing: int = 0) -> list[Shape]:
    """Return the shapes of the class ``css``, which may be followed by others."""
    return [s for s in chart.drawings[drawing].shapes if f"{s.attributes['class']} ".startswith(f"{css} ")]


def center(circle: Shape) -> tuple[float, float]:
    return float(circle.attributes["cx"]), float(circle.attributes["cy"])


def points(line: Shape) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (p.split(",") for p in line.attributes["points"].split())]
