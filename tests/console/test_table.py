"""The one table: what it prints at which width, what it gives to others, and what it never cuts."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser

import pytest

from quantization.console.columns import Column, spark
from quantization.console.table import Table, table_of
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

LONG = "model.language_model.layers.27.block_sparse_moe.experts.11.down_projection.base_layer"
COLUMNS = (
    Column("layer", "name"),
    Column("scheme"),
    Column("nbytes", "bytes", "bytes"),
    Column("share", "share"),
    Column("sqnr", "bar", "SQNR", ".1f"),
    Column("codes", "histogram", extra=True),
    Column("what", "text"),
)


def rows(count: int = 3) -> list[dict]:
    return [
        {
            "layer": f"model.layers.{i}.mlp.down_proj" if i else LONG,
            "scheme": "w4g64a",
            "nbytes": 1000 * i,
            "share": i / count,
            "sqnr": float("nan") if i == 1 else 20.0 + i,
            "codes": list(range(16)),
            "what": f"tied to {LONG}, which stays in float; untie=True replaces it"
            if i == 2
            else "",
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 400])
def test_no_line_is_too_wide_and_no_name_is_cut(width: int) -> None:
    text = Table(COLUMNS, rows()).to_text(width)
    wide = [line for line in text.splitlines() if len(line) > width]
    assert all(" " not in line.strip() for line in wide), "only a name may be wider"
    joined = "".join(line.strip() for line in text.splitlines())
    assert joined.count(LONG) == 2 and "model.layers.2.mlp.down_proj" in text
    assert "untie=True" in text
    assert ("no room for codes" in text) == (width <= 60)


def test_a_name_without_dots_is_broken_only_beyond_the_width() -> None:
    text = table_of(("layer", "n"), [("x" * 70, 1), ("y" * 90, 2)]).to_text(80)
    assert "x" * 70 in text and "y" * 80 in text


def test_the_width_of_the_terminal_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(COLUMNS, rows())
    for width in (80, 150):
        monkeypatch.setenv("COLUMNS", str(width))
        assert str(table) == repr(table) == table.to_text(width)


def test_order_and_choice() -> None:
    table = Table(COLUMNS, rows(5))
    assert [row["nbytes"] for row in table.sort("bytes", reverse=True)][:2] == [4000, 3000]
    assert [row["sqnr"] for row in table.sort("sqnr", reverse=True)][-1] != 24.0  # NaN is last
    assert len(table.filter(lambda row: row["nbytes"] > 1000)) == 3 == len(table[1:4])
    assert table[LONG] is table[0]
    with pytest.raises(KeyError, match=r"no column 'sqrn'; there are layer, .*did you mean 'sqnr'"):
        table.sort("sqrn")
    with pytest.raises(KeyError, match=r"did you mean 'model.layers.1.mlp.down_proj'"):
        table["model.layers.1.mlp.down"]
    with pytest.raises(ValueError, match="a column is one of name, text"):
        Column("a", "date")


def test_others_get_the_same_cells() -> None:
    table = Table(COLUMNS, rows())
    assert list(table.to_dict()) == [column.key for column in COLUMNS]
    assert table.to_records()[2] == rows()[2]
    pandas = pytest.importorskip("pandas")
    frame = table.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    for key, cells in table.to_dict().items():
        assert [repr(cell) for cell in frame[key]] == [repr(cell) for cell in cells]


def test_without_pandas_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs pandas: pip install pandas; to_dict\(\) needs"):
        table_of(("a",), [("x",)]).to_pandas()


class Checker(HTMLParser):
    """Every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.add(tag)
        assert not any(name in ("style", "class", "onload", "onclick") for name, _ in attrs)
        if tag != "wbr":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_whole_escaped_and_small() -> None:
    evil = '<script>alert("x")</script>&'
    columns = (*COLUMNS, Column(evil, help=evil))
    made = [row | {"layer": evil + str(i), evil: evil} for i, row in enumerate(rows(200))]
    html = Table(columns, made, evil, (evil,))._repr_html_()
    checker = Checker()
    checker.feed(html)
    assert not checker.open and "script" not in checker.seen and "style" not in checker.seen
    assert {"svg", "path", "table"} <= checker.seen and html.count("<tr>") == 201
    assert len(html) < 500_000 and "currentColor" in html and evil not in html


def test_markdown_keeps_its_columns() -> None:
    text = table_of(("a|b", Column("w")), [("x|y\nz", "*")], title="t", notes=("n",)).to_markdown()
    assert text == "**t**\n\n| a\\|b | w |\n| --- | --- |\n| x\\|y z | \\* |\n\nn"


def test_empty_columns_are_not_shown_but_known() -> None:
    table = table_of(("layer", "bits"), [("a", None)])
    assert str(table) == "layer\na" and table.to_dict() == {"layer": ["a"], "bits": [None]}
    assert str(table_of(("a",), [])) == "(no rows)"


def test_odd_cells() -> None:
    column = Column("x", "number")
    assert [column.text(x) for x in (None, 3, float("inf"), 0.123456, (2, 3))] == [
        "", "3", "inf", "0.1235", "2 x 3"
    ]  # fmt: skip
    assert spark([]) == "" and len(spark(range(1000))) <= 8 and set(spark([0, 0])) == {" "}


def test_it_needs_nothing_else() -> None:
    code = (
        "import sys, quantization.console.table as t; str(t.table_of(('a',), [('x',)]))\n"
        "bad = {'torch', 'numpy', 'pandas'} & set(sys.modules); assert not bad, bad\n"
        "print(t.table_of(('a', t.Column('h', 'histogram')), [('x', [1, 2])]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(filter(None, sys.path))},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
