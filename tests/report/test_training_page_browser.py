"""A record's page in Chromium, at the width of a phone and of a desk, in both themes. Pictures: out/screenshots."""

import base64

import pytest
from browsers import DESK, PHONE, SCREENSHOTS
from training_records import hostile_record, odd_records, record_of

from eakd_kernels.report.training_view import view_of

pytest.importorskip("selenium", reason="needs selenium, which is in the extra dev")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

sizes = pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
WORDS = [f" word{i}" for i in range(50)]


@pytest.fixture(scope="module")
def records():
    return {"training": record_of(range(60), decode=WORDS.__getitem__), "hostile training": hostile_record()}


def reading(browser):
    """The caption and the first row of the table below the charts."""
    label = browser.find_element(By.ID, "label").text
    return label, [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "#reading tbody tr:first-child td")]


def wanted(record, number):
    return [f"{value:.2f}" for value in view_of(record).bands[number][0]] + ["0"]


def open_details(browser):
    browser.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")


@sizes
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["training", "hostile training"])
def test_pictures(open_page, records, size, scheme, name):
    browser = open_page(records[name].render(), size, prefers_color_scheme=scheme)
    open_details(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    height = browser.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": size[0], "height": height, "scale": 1}
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    width = "phone" if size == PHONE else "desk"
    (SCREENSHOTS / f"{name.replace(' ', '-')}-{scheme}-{width}.png").write_bytes(base64.b64decode(picture["data"]))


@sizes
@pytest.mark.parametrize("name", odd_records())
def test_degenerate_records(open_page, size, name):
    browser = open_page(odd_records()[name].render(), size)
    assert browser.find_element(By.CSS_SELECTOR, ".time svg").size["height"] > 100


@sizes
def test_keyboard(open_page, records, size):
    record = records["training"]
    browser = open_page(record.render(), size)
    slider = browser.find_element(By.ID, "step")
    assert reading(browser) == ("Step 59", wanted(record, 59))
    for keys, number in ((Keys.LEFT, 58), (Keys.HOME, 0), (Keys.RIGHT, 1), (Keys.END, 59)):
        slider.send_keys(keys)
        assert reading(browser) == (f"Step {number}", wanted(record, number))
        assert slider.get_attribute("aria-valuetext") == f"Step {number}"
        line = browser.find_element(By.CSS_SELECTOR, ".reading").text
        assert line.startswith(f"Step {number}: median {wanted(record, number)[2]}, half of the rows from")


@sizes
def test_pointing_at_a_chart(open_page, records, size):
    browser = open_page(records["training"].render(), size)
    chart = browser.find_elements(By.CSS_SELECTOR, ".time svg")[2]
    for across, number in ((0.25, 15), (0.75, 45)):  # of 0..60
        offset = round((across - 0.5) * chart.size["width"])
        ActionChains(browser).move_to_element_with_offset(chart, offset, 0).perform()
        assert reading(browser)[0] == f"Step {number}"
        places = browser.execute_script(
            "return [...document.querySelectorAll('.cursor')].map((c) => c.getBoundingClientRect().x - "
            "c.closest('svg').getBoundingClientRect().x)"
        )
        assert len(places) == 4 and all(abs(x - places[0]) < 0.05 * chart.size["width"] for x in places)
        assert abs(places[2] / chart.size["width"] - across) < 0.01


@sizes
def test_everything_interactive_is_in_the_order_of_tabs(open_page, records, size):
    browser = open_page(records["training"].render(), size)
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    stops = []
    for _ in range(3):
        focused = browser.switch_to.active_element
        stops.append(focused.get_attribute("id") or focused.text)
        outline = "return getComputedStyle(arguments[0]).outlineStyle"
        assert browser.execute_script(outline, focused) != "none"
        focused.send_keys(Keys.TAB)
    assert stops == ["step", "The numbers", "The same early in training, steps 0 to 7"]


def test_figures_are_described_and_tables_have_heads(open_page, records):
    browser = open_page(records["training"].render())
    described = [svg.get_attribute("aria-label") for svg in browser.find_elements(By.CSS_SELECTOR, "svg[role=img]")]
    assert len(described) == 12 and len(set(described)) == 12
    assert described[0].startswith("Teacher's entropy by step, in nats: early in training, steps 0 to 7, median ")
    tables = browser.find_elements(By.TAG_NAME, "table")
    assert all(table.find_elements(By.CSS_SELECTOR, "thead th[scope=col]") for table in tables)
    assert all(table.find_elements(By.TAG_NAME, "caption") for table in tables)


def test_labels_are_where_their_lines_are(open_page, records):
    """Ticks are HTML, lines SVG."""
    browser = open_page(records["training"].render())
    found = browser.execute_script(
        """
        const plot = document.querySelector(".time .plot"), svg = plot.querySelector("svg").getBoundingClientRect();
        const middle = (e, side, size) => e.getBoundingClientRect()[side] + e.getBoundingClientRect()[size] / 2;
        return [
            [...plot.querySelectorAll(".y.at span")].map((e) => (middle(e, "top", "height") - svg.top) / svg.height),
            [...plot.querySelectorAll(".x.at span")].map((e) => (middle(e, "left", "width") - svg.left) / svg.width),
        ];
        """
    )
    for places in found:
        assert places == pytest.approx([i / (len(places) - 1) for i in range(len(places))], abs=0.01)


def test_nothing_moves(open_page, records):
    browser = open_page(records["training"].render(), prefers_reduced_motion="no-preference")
    browser.find_element(By.ID, "step").send_keys(Keys.HOME)
    assert browser.execute_script("return document.getAnimations().length") == 0


def test_without_its_script(chromium, open_page, records):
    """The numbers of the last step, and no slider."""
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser = open_page(records["training"].render())
        assert browser.find_element(By.ID, "label").text == "Step 59"
        assert not browser.find_element(By.ID, "step").is_displayed()
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible(open_page, records, scheme):
    """Every piece of text on what is behind it: 4.5 to 1, as WCAG 2 wants it."""
    browser = open_page(records["training"].render(), prefers_color_scheme=scheme)
    open_details(browser)
    assert browser.execute_script(LEAST_CONTRAST) >= 4.5


LEAST_CONTRAST = """
const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const pixel = (colour) => {
  context.clearRect(0, 0, 1, 1);
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data];
};
const linear = (c) => (c <= 10 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const behind = (e) => {
  const colour = pixel(getComputedStyle(e).backgroundColor);
  return colour[3] === 255 ? colour : behind(e.parentElement);
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let least = Infinity;
while (walker.nextNode()) {
  const e = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !e.checkVisibility()) continue;
  const [dark, light] = [pixel(getComputedStyle(e).color), behind(e)].map(luminance).sort((a, b) => a - b);
  least = Math.min(least, (light + 0.05) / (dark + 0.05));
}
return least;
"""
