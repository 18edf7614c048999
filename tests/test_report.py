"""report.html: what it says, that it needs nothing else, and what a real browser makes of it."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from run_driver import arguments, begin, make_samples, train

from grpo.errors import UserError
from grpo.runs.report import _figure, redraw

HOSTILE = "</pre><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> 7 < 8 & 9"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A run with curves, an alarm, hostile samples, and held-out questions before and after."""
    directory = tmp_path_factory.mktemp("runs") / "run <i>name"
    run = begin(arguments(run_dir=directory))
    for step in range(13):
        run.log(step, {"reward": step / 10, "kl": 0.7, "eval/pass_at_1": None if step % 6 else step / 24})
    for step, answer in ((0, "I do not know\u2028at\x85all"), (12, "It is 7")):
        samples = make_samples(["Q: 3+4?", "other"], [answer, "x"])
        run.save_completions(step, samples, {"correct": [step / 12, 0]}, split="eval")
    samples = make_samples(["What is 7+1?"], ["worst", HOSTILE, "middle", "middle", "middle"])
    run.save_completions(10, samples, {"correct": [0, 1, 0, 0, 0]}, [-1.0, 2.0, 0, 0, 0])
    run.refresh()
    return directory


def test_the_report_says_what_the_run_did(directory):
    page = (directory / "report.html").read_text()
    assert "<h1>run &lt;i&gt;name</h1>" in page
    assert "KL to the reference is 0.70 nats per token" in page
    assert "<td>reward</td><td>0 <small>step 0</small></td><td>1.2 <small>step 12</small></td>" in page
    assert "<td>eval/pass_at_1</td><td>0 <small>step 0</small></td><td>0.5 <small>step 12</small></td>" in page
    before, after = page.index("I do not know"), page.index("It is 7")
    assert page.index("Q: 3+4?") < before < after
    samples = page[page.index("Training samples of step 10") :]
    assert samples.index("advantage +2.000") < samples.index("advantage -1.000")
    assert samples.count("middle") == 2  # the two best and the two worst of five
    assert json.dumps(str(directory))[1:-1].replace("<", "&lt;").replace(">", "&gt;") in page  # run.json's arguments


def test_the_report_needs_nothing_else_and_escapes_what_models_wrote(directory):
    page = (directory / "report.html").read_text()
    assert "<script" not in page
    assert "7 &lt; 8 &amp; 9" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\(|@import|https?://""", page.replace(HOSTILE, ""))
    image = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(image[1]) == (directory / "rewards.png").read_bytes()


def test_a_report_without_data_yet(tmp_path):
    run = begin(arguments(run_dir=tmp_path / "run"))
    run.refresh()  # nothing logged: nothing drawn
    assert not (tmp_path / "run/report.html").exists()
    redraw(tmp_path / "run")
    assert "no curves yet" in (tmp_path / "run/report.html").read_text()


def test_a_report_is_drawn_again_from_the_directory_alone(directory, tmp_path):
    copy = tmp_path / directory.name
    shutil.copytree(directory, copy)
    for name in ("rewards.png", "report.html"):
        (copy / name).unlink()
    redraw(copy)
    for name in ("rewards.png", "report.html"):
        assert (copy / name).read_bytes() == (directory / name).read_bytes()
    with pytest.raises(UserError, match="holds no run"):
        redraw(tmp_path)


def test_only_panels_with_data_are_drawn():
    lines = [{"step": 1, "reward": 1.0, "kl": None, "clip_low": 0.1, "clip_high": 0.2, "times": {}}]
    axes = [axis for axis in _figure(lines, "title").axes if axis.axison]
    assert [axis.get_title() for axis in axes] == ["reward", "fractions: truncated, zero variance, clipped"]
    assert [list(line.get_ydata()) for line in axes[1].lines] == [[0.1], [0.2]]


def test_curves_are_redrawn_while_the_run_goes_on(tmp_path):
    seen = []

    def look(run, step):
        seen.append((tmp_path / "run/report.html").exists() and (tmp_path / "run/rewards.png").exists())

    train(arguments(run_dir=tmp_path / "run", steps=3), at_step=look, refresh_seconds=1e-6)
    assert seen[-1]
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_a_browser_opens_it(directory, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    page = tmp_path / "report.html"  # alone: whatever else it needed would be missing
    page.write_text((directory / "report.html").read_text())
    picture = tmp_path / "shot.png"

    def chromium(*options):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += [*options, page.as_uri()]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    dom = chromium("--dump-dom")
    assert "<title>run &lt;i&gt;name</title>" in dom  # no sample's script ran
    assert dom.count('<div class="samples">') == 3
    assert "It is 7" in dom
    chromium(f"--screenshot={picture}", "--window-size=1200,1500")
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3).astype(int)
    curve = (np.abs(pixels - [31, 119, 180]).sum(1) < 12).sum()  # matplotlib's first blue
    alarm = (pixels == [255, 243, 205]).all(1).sum()
    assert curve > 200
    assert alarm > 10_000
