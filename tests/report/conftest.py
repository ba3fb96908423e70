import shutil

import pytest
from browsers import DESK

PROGRAMS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}


@pytest.fixture(scope="session")
def chromium():
    if missing := [name for name, path in PROGRAMS.items() if path is None]:
        pytest.skip(f"needs {' and '.join(missing)}, of Debian's chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAMS["chromium"]
    # Root, as which CI runs, has no sandbox; containers have a /dev/shm too small for pictures.
    for switch in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(PROGRAMS["chromedriver"]))
    yield driver
    driver.quit()


@pytest.fixture
def open_page(chromium, tmp_path):
    """open_page(html, size=, **media): a browser that shows it. Whatever the test does, nothing may go wrong inside."""
    from selenium.webdriver.common.action_chains import ActionChains

    def show(html, size=DESK, **media):
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        chromium.get_log("browser")
        chromium.get(file.as_uri())
        away = ActionChains(chromium)
        away.w3c_actions.pointer_action.move_to_location(0, 0)
        away.perform()
        return chromium

    yield show
    assert chromium.get_log("browser") == []
    assert chromium.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert chromium.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert chromium.execute_script("return window.hacked") is None
