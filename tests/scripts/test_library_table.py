"""Test that the table of other libraries' classes in docs/models.md is up to date."""

from scripts import library_table as page


def without_errors(table: str) -> list[str]:
    """Return the rows, without the errors that rounding decides."""
    return [row.rpartition("engine |")[0] or row for row in table.strip().splitlines()]


def test_the_page_has_the_times_that_were_measured() -> None:
    text = page.PAGE.read_text()
    assert page.replaced(text, page.BEGIN_TIMES, page.times(), page.END_TIMES) == text, "run scripts/library_table.py"


def test_the_page_has_every_class_and_its_route() -> None:
    _, _, rest = page.PAGE.read_text().partition(page.BEGIN + "\n")
    found = rest.partition(page.END)[0]
    assert without_errors(found) == without_errors(page.table(measured=False)), "run scripts/library_table.py"
