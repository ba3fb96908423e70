"""The page in Chromium, at the width of a phone and of a desk, in both themes. Pictures: out/screenshots."""

import math
import re

import pytest
from browsers import DESK, PHONE, SCREENSHOTS
from token_pages import HOSTILE, hostile_passage, page, passage, prediction, row

from eakd_kernels.report import Passage, View

pytest.importorskip("selenium", reason="needs selenium, which is in the extra dev")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

SENTENCE = "The distillation loss of a token is weighted by what there is to learn from it, and by nothing else."
WORDS = re.findall(r" ?\S+", 3 * f"{SENTENCE} ")
WEIGHTS = [i / 100 for i in range(len(WORDS) - 1)]
READABLE = passage(WORDS, WEIGHTS, WEIGHTS[::-1])


@pytest.fixture
def opened(open_page):
    """opened(passage, size=, **media): a browser that shows it."""
    return lambda what, size=DESK, **media: open_page(page(what), size, **media)


def tokens(browser, view=0):
    passages = browser.find_elements(By.CSS_SELECTOR, ".passage")
    return passages[view].find_elements(By.CSS_SELECTOR, ".token")


def details(browser):
    panel = browser.find_element(By.ID, "panel")
    return browser.find_element(By.ID, "details").text if panel.is_displayed() else ""


def announced(browser):
    return browser.find_element(By.ID, "announcement").get_attribute("textContent")


def press(browser, *keys):
    for key in keys:
        ActionChains(browser).send_keys(key).perform()


def place(browser):
    """Which token has the focus, of which view."""
    focused = browser.switch_to.active_element
    return next((view, tokens(browser, view).index(focused)) for view in (0, 1) if focused in tokens(browser, view))


sizes = pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])


@sizes
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("shown", [READABLE, hostile_passage()], ids=["readable", "hostile"])
def test_pictures(opened, request, size, scheme, shown):
    browser = opened(shown, size, prefers_color_scheme=scheme)
    tokens(browser)[5].click()
    assert "token 6 of" in details(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(SCREENSHOTS / f"{request.node.callspec.id}.png"))


@sizes
def test_what_is_pointed_at_shows_for_as_long(opened, size):
    browser = opened(READABLE, size)
    token = tokens(browser)[2]
    ActionChains(browser).move_to_element(token).perform()
    said = details(browser)
    assert "loss" in said and "token 3 of 60" in said
    assert "0.010" in said and "0.570" in said  # w in both views
    assert "2.25" in said and "9.75" in said  # entropies
    assert "50 %" in said and "␣b" in said  # candidates
    assert announced(browser) == ""  # a mouse that wanders says nothing aloud
    ActionChains(browser).move_to_element(browser.find_element(By.CSS_SELECTOR, ".view h2")).perform()
    assert "token 3 of 60" not in details(browser)


@sizes
def test_keyboard(opened, size):
    browser = opened(READABLE, size)
    browser.execute_script("document.querySelector('.passage .token').focus()")
    seen = [place(browser)]
    for keys in ([Keys.RIGHT], [Keys.RIGHT], [Keys.LEFT], [Keys.END], [Keys.RIGHT], [Keys.HOME], [Keys.LEFT]):
        press(browser, *keys)
        seen.append(place(browser))
    assert [i for _, i in seen] == [0, 1, 2, 1, 59, 59, 0, 0]
    press(browser, Keys.RIGHT, Keys.RIGHT)
    assert "token 3 of 60" in details(browser)
    assert announced(browser).startswith("Token 3 of 60, “␣loss”, before training: weight 0.010; teacher: entropy 2.25")
    top = tokens(browser)[2].rect
    press(browser, Keys.DOWN)
    below = browser.switch_to.active_element.rect
    assert below["y"] > top["y"] + top["height"] / 2 and abs(below["x"] - top["x"]) < 100
    press(browser, Keys.UP)
    assert abs(browser.switch_to.active_element.rect["y"] - top["y"]) < 1


@sizes
def test_a_passage_is_one_stop_of_the_tab_key(opened, size):
    browser = opened(READABLE, size)
    browser.execute_script("document.querySelector('.passage .token').focus()")
    press(browser, Keys.RIGHT, Keys.TAB)
    view, _ = place(browser)
    assert view == 1
    browser.switch_to.active_element.send_keys(Keys.SHIFT, Keys.TAB)
    assert place(browser) == (0, 1)
    for view in (0, 1):
        assert [t.get_attribute("tabindex") for t in tokens(browser, view)].count("0") == 1
    assert browser.execute_script("return document.querySelectorAll('[aria-selected=true]').length") == 1


def test_a_chosen_token_is_not_covered(opened):
    browser = opened(READABLE, PHONE)
    tokens(browser, 1)[-1].click()
    where = "return document.elementFromPoint(...((r) => [r.x + r.width / 2, r.y + r.height / 2])(arguments[0]"
    for i in (-1, 0):
        token = tokens(browser, 1)[i]
        press(browser, Keys.END if i else Keys.HOME)
        assert browser.execute_script(f"{where}.getBoundingClientRect()))", token) == token
    press(browser, Keys.ESCAPE)
    assert details(browser) == ""
    token.click()  # which has the focus already
    assert token.get_attribute("aria-selected") == "true"
    browser.find_element(By.ID, "close").click()
    assert details(browser) == ""


@sizes
def test_hostile_tokens_are_shown_as_text(opened, size):
    browser = opened(hostile_passage(), size)
    assert browser.find_elements(By.CSS_SELECTOR, "main script, main img, h2 b") == []
    shown = browser.execute_script("return arguments[0].map((t) => t.textContent.toWellFormed())", tokens(browser))
    for i, text in enumerate(HOSTILE):
        assert all(line in shown[i] for line in text.replace("\x00\x1b\x85", "␀␛U+0085").replace("\ud800", "").split())
    tokens(browser)[1].click()
    assert "</script><img␣src=x␣onerror='window.hacked␣=␣2'>" in details(browser)
    press(browser, Keys.END, Keys.UP, Keys.UP, Keys.DOWN, Keys.END, Keys.LEFT)
    assert "x" * 400 in announced(browser)


READ_CONTRAST = """
const pixel = (colour) => {
  const context = new OffscreenCanvas(1, 1).getContext("2d");
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data];
};
return [...document.querySelectorAll(arguments[0])].map((shaded) => {
  const { color, backgroundColor } = getComputedStyle(shaded);
  return [pixel(color), pixel(backgroundColor)];
});
"""


def luminance(pixel):
    """Relative, as WCAG 2 defines it."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in pixel[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_on_every_shade(opened, scheme):
    shades = passage(["x"] * 22, [i / 20 for i in range(21)])
    browser = opened(shades, prefers_color_scheme=scheme)
    read = browser.execute_script(READ_CONTRAST, ".passage .token:not(.unweighted)")
    backgrounds = [luminance(background) for _, background in read]
    assert backgrounds == sorted(backgrounds, reverse=scheme == "light") and len(set(backgrounds)) == 21
    for (text, _), background in zip(read, backgrounds, strict=True):
        dark, light = sorted((luminance(text), background))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_forced_colours_turn_weights_into_lines(opened):
    browser = opened(passage("abc", [0.1, 1.0]), forced_colors="active")
    width = "return parseFloat(getComputedStyle(arguments[0]).borderBottomWidth)"
    none, little, much = (browser.execute_script(width, token) for token in tokens(browser))
    assert none == 0 < little < much


@sizes
@pytest.mark.parametrize(
    "shown",
    [
        passage("", []),
        passage("a", []),
        Passage((), ()),
        Passage(
            ("a", "b"),
            (
                View(
                    "",
                    (
                        None,
                        row(math.nan, prediction(math.nan, -math.inf, (("a", math.nan),))),
                    ),
                ),
            ),
        ),
    ],
    ids=["empty", "one token", "no view", "not a number"],
)
def test_degenerate_passages(opened, size, shown):
    browser = opened(shown, size)
    if shown.tokens:
        tokens(browser)[-1].click()
        assert f"token {len(shown.tokens)} of {len(shown.tokens)}" in details(browser)
    if len(shown.tokens) == 2:
        assert "NaN" in details(browser) and "weight NaN" in announced(browser)
