"""The report in a browser: it is sorted and filtered, fits a telephone, and (the fixture looks after that) asks for nothing."""

import pytest

WIDTHS = (1200, 800, 390)


def shown(page):
    """The rows of the table of examples that can be seen, as lists of cells."""
    script = (
        "rows => rows.filter(row => row.checkVisibility()).map(row => [...row.cells].map(cell => cell.textContent))"
    )
    return page.locator(".cards tbody tr").evaluate_all(script)


def column(page, name):
    """The cells of a column of that table."""
    heads = [head.rstrip(" ↕↑↓") for head in page.locator(".cards th").all_text_contents()]
    return [row[heads.index(name)] for row in shown(page)]


@pytest.mark.parametrize("width", WIDTHS[::2])
def test_sorts_by_a_click_and_back(opened, width):
    page = opened(width)
    before = column(page, "ρ̃")
    head = page.locator(".cards th", has_text="α")
    head.locator("button").click()
    rising = [float(cell) for cell in column(page, "α")]
    assert rising == sorted(rising)
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    assert [float(cell) for cell in column(page, "α")] == rising[::-1]
    assert head.get_attribute("aria-sort") == "descending"
    page.locator(".cards th", has_text="end").locator("button").click()
    assert head.get_attribute("aria-sort") is None
    assert column(page, "end") == [f"{end} {k}" for end in ("least", "most") for k in range(1, 25)]
    assert column(page, "ρ̃") == before


@pytest.mark.parametrize("width", WIDTHS[::2])
def test_filters(opened, width):
    page = opened(width)
    output = page.locator(".broad output")
    assert output.text_content() == "48 of 48"
    page.get_by_label("which").select_option("least")
    assert column(page, "end") == [f"least {k}" for k in range(1, 25)]
    page.get_by_label("prediction").select_option("wrong")
    wrong = shown(page)
    assert 0 < len(wrong) < 24
    assert all(row[0].startswith("least") and row[7].startswith("✗") for row in wrong)
    name = wrong[0][1]
    page.locator(".broad input").fill(name.upper())
    assert wrong[0] in shown(page)
    assert output.text_content() == f"{len(shown(page))} of 48"
    page.locator(".broad input").fill("no such example")
    assert shown(page) == []
    page.locator(".broad input").fill("")
    page.get_by_label("prediction").select_option("")
    page.get_by_label("which").select_option("")
    assert len(shown(page)) == 48


def test_filters_what_was_sorted(opened):
    page = opened()
    page.locator(".cards th", has_text="α").locator("button").click()
    page.get_by_label("which").select_option("most")
    values = [float(cell) for cell in column(page, "α")]
    assert len(values) == 24
    assert values == sorted(values)


def test_by_the_keyboard_alone(opened):
    """Tab reaches what filters and sorts, and shows where it is; letters, arrows and Enter work it."""
    page = opened()

    def tab_to(selector):
        for _ in range(100):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement.matches({selector!r})"):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none"
                return
        raise AssertionError(f"Tab does not reach {selector}")

    tab_to(".broad select")
    page.keyboard.press("ArrowDown")
    assert len(shown(page)) == 24
    tab_to(".broad input")
    page.keyboard.type("digit")
    page.keyboard.press("Enter")
    assert len(shown(page)) == 24
    tab_to(".cards th:last-child button")
    page.keyboard.press("Enter")
    assert page.locator(".cards th:last-child").get_attribute("aria-sort") == "ascending"


@pytest.mark.parametrize("width", WIDTHS)
def test_fits(opened, width):
    """Nothing is cut off: neither the page nor the table of examples is wider than the window, and pictures are seen."""
    page = opened(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    table = page.locator(".cards").evaluate("table => table.getBoundingClientRect().right")
    assert table <= width
    sizes = page.locator("img").evaluate_all(
        "all => all.map(one => [one.naturalWidth, one.getBoundingClientRect().width])"
    )
    assert len(sizes) == 3 + 3 * 48
    assert all(own > 0 and seen >= 60 for own, seen in sizes)
    assert all(
        float(size) >= 12
        for size in page.locator("td, p, figcaption").evaluate_all(
            "all => all.filter(one => one.checkVisibility()).map(one => parseFloat(getComputedStyle(one).fontSize))"
        )
    )


def test_says_everything_without_colours(opened):
    """What is right and wrong has a sign, what a picture shows has words, and a map is read by lightness."""
    page = opened()
    assert {cell[0] for cell in column(page, "true")} == {"✓", "✗"}
    assert page.locator("img:not([alt])").count() == page.locator("img[alt='']").count() == 0
