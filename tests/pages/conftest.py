"""Results with every kind of example, a report of them, and a browser that notes whatever a page asks for or complains of."""

import shutil

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import fastsal

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
N, CLASSES = 130, 5
PATIENCE = 120_000  # milliseconds, on a busy machine
BAD = 7  # an example that cannot be read


class Digits(Dataset):
    """Images with their classes, one of which cannot be read."""

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self.x, self.y = torch.rand(N, 1, 6, 6, generator=draw), torch.randint(CLASSES, (N,), generator=draw)

    def __len__(self):
        return N

    def __getitem__(self, index):
        if index == BAD:
            raise OSError("this file is truncated <b>")
        return self.x[index], self.y[index]


@pytest.fixture(scope="session", autouse=True)
def _optional_packages():
    for module in ("matplotlib", "PIL", "pyarrow"):
        pytest.importorskip(module)


@pytest.fixture(scope="session")
def data():
    return Digits()


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, CLASSES)).eval()


@pytest.fixture(scope="session")
def results(tmp_path_factory, data, model):
    """A folder of results."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    with pytest.warns(UserWarning, match="truncated"):
        fastsal.evaluate(model, data, folder, batch_size=32, save_every=0, names=[f"digit {k}" for k in range(N)])
    return folder


@pytest.fixture(scope="session")
def written(results, data, model):
    """The report of them, with images, maps and the names of classes."""
    names = ["zero", "one", "two <2>", "three", "four"]
    return fastsal.report(results, data=data, model=model, classes=names, out=results.parent / "report.html")


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    executable = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if executable is None:
        pytest.skip(f"needs a browser, one of {', '.join(CHROMIUM)}")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, written):
    """`opened(width)`: the report in a window so wide. At the end, nothing was asked for and nothing complained of."""
    noted, pages = [], []

    def open_(width=1200):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: noted.append(request.url.partition(",")[0]))
        page.on("console", lambda message: noted.append(message.text))
        page.on("pageerror", lambda error: noted.append(str(error)))
        page.goto(written.as_uri())
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.close()
    assert {one for one in noted if not one.startswith("data:image/")} == {written.as_uri()}
