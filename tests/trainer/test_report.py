"""The report: attempts merged into one history, its figures, and the page, also as a real browser shows it."""

from __future__ import annotations

import base64
import json
import math
import os
import shutil
from array import array
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from bs4 import BeautifulSoup

from sft_api.events import Event, Message, PreviewMessage
from sft_api.manifest import parse_job
from sft_api.recipes import resolve
from sft_api.run import RunConfig
from sft_trainer.report import History, ReportData, merge, render, wording
from sft_trainer.report.curves import MAX_POINTS, packed, payload, thinned
from sft_trainer.report.figures import job_figures, phase_figures, restart_steps, validation_change
from tests.cli.events import checkpoint, exported, finished, prepared, started, step, steps, validation, whole_run

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

NASTY = "</script><script>alert('no')</script><b>&amp;"


def page(history: History, config: RunConfig | None = None, name: str = "small") -> BeautifulSoup:
    return BeautifulSoup(html(history, config, name), "html.parser")


def html(history: History, config: RunConfig | None = None, name: str = "small") -> str:
    generated = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
    return render(ReportData(name=name, uri="file://runs/job", history=history, generated=generated, config=config))


def config() -> RunConfig:
    phases = [{"name": name, "data": [{"uri": f"file://{name}.jsonl"}]} for name in ("instruct", "skills")]
    spec = {
        "model": {"uri": "file://model"},
        "recipe": "TULU",
        "strategy": "Phased",
        "phases": phases,
        "checkpoints": {"uri": "file://runs/job"},
    }
    document = {"apiVersion": "sftjob.dev/v1alpha1", "kind": "SFTJob", "metadata": {"name": "small"}, "spec": spec}
    return resolve(parse_job(document))


def restarted() -> dict[int, list[Event]]:
    """Three attempts: the second goes back to step 5, the third to step 7 and to the end."""
    return {
        1: [prepared(), started(20), validation(0, 3.1, 0.1), *steps(1, 8), checkpoint(5), validation(8, 2.0, 0.3)],
        2: [started(20, 2, 5), *steps(6, 9), checkpoint(7), Message(level="warning", text="slow disk")],
        3: [
            started(20, 3, 7),
            *steps(8, 20, "skills"),
            validation(20, 1.0, 0.7, "skills"),
            exported(20, "skills"),
            finished(),
        ],
    }


def test_a_later_attempt_replaces_what_earlier_ones_did_from_its_first_step_on() -> None:
    history = merge(restarted())
    assert [event.step for event in history.steps] == list(range(1, 21))
    assert [event.phase for event in history.steps] == ["instruct"] * 7 + ["skills"] * 13
    assert [event.step for event in history.validations] == [0, 20]
    assert [event.step for event in history.checkpoints] == [5, 7]
    assert [(a.number, a.first_step, a.last_step, a.steps_lost) for a in history.attempts] == [
        (1, 1, 8, 3),
        (2, 6, 9, 2),
        (3, 8, 20, 0),
    ]
    assert restart_steps(history) == [6, 8]
    assert history.warnings == ["slow disk"]


def test_an_attempt_that_took_no_step_takes_none_away() -> None:
    history = merge({1: [started(20), *steps(1, 8)], 2: [started(20, 2, 5)]})
    assert [event.step for event in history.steps] == list(range(1, 9))
    assert history.steps_lost == 0


def test_figures_are_means_by_time_and_sums_from_the_jobs_begin() -> None:
    history = merge({1: [step(1), step(2, seconds=1.5, tokens_per_second=800.0, packing_efficiency=0.77)]})
    figures = job_figures(history)
    assert figures is not None
    assert figures.tokens_per_second == pytest.approx((0.5 * 1600 + 1.5 * 800) / 2)
    assert figures.packing_efficiency == pytest.approx((0.5 * 0.97 + 1.5 * 0.77) / 2)
    assert (figures.samples, figures.tokens, figures.loss_tokens, figures.seconds) == (16, 1600, 600, 2.0)


def test_each_phase_has_figures_of_its_own() -> None:
    first, second = phase_figures(merge({1: whole_run()}))
    assert (first.name, first.first_step, first.last_step, first.samples) == ("instruct", 1, 10, 80)
    assert (second.name, second.first_step, second.last_step, second.samples) == ("skills", 11, 20, 80)
    assert job_figures(merge({})) is None


def test_before_and_after_need_two_scores() -> None:
    assert validation_change(merge({1: [validation(0, 3.0, 0.1)]})) is None
    change = validation_change(merge({1: whole_run()}))
    assert change is not None
    assert (change[0].accuracy, change[1].accuracy) == (0.18, 0.74)


def test_curves_survive_a_loss_that_is_no_number() -> None:
    values = array("f", base64.b64decode(packed([1.5, math.nan, math.inf])))
    assert values[0] == 1.5
    assert math.isnan(values[1])
    assert math.isinf(values[2])


def test_thinned_curves_keep_both_ends_and_every_spike() -> None:
    many = [step(number) for number in range(1, 3 * MAX_POINTS)]
    many[30_001] = step(30_002, loss=99.0)
    many[40_002] = step(40_003, grad_norm=77.0)
    few = thinned(many, MAX_POINTS)
    kept = [event.step for event in few]
    assert len(kept) <= MAX_POINTS
    assert kept == sorted(set(kept))
    assert {1, 30_002, 40_003, len(many)} <= set(kept)
    assert thinned(many[:50], MAX_POINTS) == many[:50]


def test_the_page_has_the_figures_the_tables_and_the_recipe() -> None:
    found = page(merge({1: whole_run()}, [prepared(), prepared("skills", dropped={})]), config())
    headings = [heading.text for heading in found.find_all("h2")]
    assert headings == [
        "Curves",
        "Phases",
        "Held-out data",
        "Data",
        "Checkpoints and exports",
        "Attempts",
        "Resolved recipe",
    ]
    tiles = {tile.find(class_="label").text: tile.find(class_="value").text for tile in found.find_all(class_="tile")}
    assert tiles["Training loss"] == "2.81 → 1.271"
    assert tiles["Held-out accuracy"] == "18.0% → 74.0%"
    assert tiles["Steps"] == "20 / 20"
    assert found.find(class_="badge").text == "Completed"
    assert "15 dropped (12 NoLossTokens, 3 Overlong)" in found.text
    assert "17 + 25 = 42.<|im_end|>" in [mark.text for mark in found.find_all("mark")]
    assert "optimizer.warmup" in found.text
    assert "ratio 0.03" in found.text


def test_a_job_without_a_step_still_has_a_page() -> None:
    found = page(merge({1: [finished(11, "Data", "line 7 of a.jsonl is no JSON")]}))
    assert found.find(class_="badge").text == "Data"
    assert "No step has been taken yet." in found.text
    assert found.find(id="plots") is None


def test_a_run_under_way_says_so() -> None:
    found = page(merge({1: [started(20), *steps(1, 5)]}))
    assert found.find(class_="badge").text == "Under way"
    assert "not begun" in found.text


def test_nothing_that_a_user_wrote_becomes_part_of_the_page() -> None:
    sample = [PreviewMessage(text=NASTY, trained=True)]
    events = [
        started(2).model_copy(update={"device": NASTY, "attention_reason": NASTY}),
        step(1, phase=NASTY),
        checkpoint(1).model_copy(update={"uri": NASTY, "phase": NASTY}),
        Message(level="warning", text=NASTY),
        finished(message=NASTY),
    ]
    history = merge({1: events}, [prepared(NASTY, preview=[sample], dropped={NASTY: 1}, fingerprint=NASTY)])
    found = page(history, name=NASTY)
    scripts = found.find_all("script")
    assert len(scripts) == 3
    assert json.loads(scripts[0].text)["phases"][0]["name"] == NASTY
    assert set(scripts[0].text) & set("<>&") == set()
    assert "alert" not in scripts[1].text + scripts[2].text
    assert found.find("b") is None
    assert found.find("h1").text.startswith(NASTY)


def test_the_page_fetches_nothing() -> None:
    found = page(merge({1: whole_run()}), config())
    policy = found.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert policy.startswith("default-src 'none'")
    addressed = [tag for tag in found.find_all(True) if tag.has_attr("src") or tag.has_attr("href")]
    assert [tag["href"] for tag in addressed] == ["data:,"]


def test_the_page_of_ten_thousand_steps_is_small() -> None:
    assert len(html(merge({1: [started(10_000), *steps(1, 10_000)]}))) < 600_000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (wording.short_count(9_999), "9,999"),
        (wording.short_count(12_345), "12.3k"),
        (wording.short_count(4_560_000), "4.56M"),
        (wording.short_count(7.2e9), "7.2G"),
        (wording.size(999), "999 B"),
        (wording.size(1_400_000_000), "1.4 GB"),
        (wording.duration(0.424), "0.42 s"),
        (wording.duration(12.34), "12.3 s"),
        (wording.duration(245), "4:05"),
        (wording.duration(7384), "2:03:04"),
        (wording.moment(0), "1970-01-01 00:00:00 UTC"),
        (wording.dropped({}), "none dropped"),
        (wording.visible("a\x1b[2J\r\x9bb\tc\n"), "a␛[2J␍�b\tc\n"),
        (wording.number(math.nan), "nan"),
        (wording.number(123456.0), "1.235e+05"),
    ],
)
def test_figures_read_as_a_person_writes_them(words: str, expected: str) -> None:
    assert words == expected


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Debian's chromium, headless, with the console's and the network's logs."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver):
        reason = "chromium and chromedriver are not installed (Debian: chromium chromium-driver)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1300,1000"]
    for flag in [*flags, f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = webdriver.Chrome(options=options, service=Service(driver))
    yield running
    running.quit()


PAINTED = """
const drawn = new Set([0x1f5fbf, 0xc2500a]);
return [...document.querySelectorAll("#plots canvas")].map((canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let pixels = 0;
  for (let i = 0; i < data.length; i += 4) {
    if (data[i + 3] === 255 && drawn.has((data[i] << 16) | (data[i + 1] << 8) | data[i + 2])) pixels += 1;
  }
  return pixels;
});
"""
"""Pixels in the colours of the light style sheet's curves, of each plot."""


def opened(chromium: Chrome, folder: Path, text: str) -> list[int]:
    """Open the page; how many pixels of each plot are curve."""
    (folder / "report.html").write_text(text)
    chromium.get("about:blank")  # nothing of an earlier page is under way any longer
    chromium.get_log("browser")
    chromium.get_log("performance")
    chromium.get((folder / "report.html").as_uri())
    pixels: list[int] = chromium.execute_script(PAINTED)
    return pixels


def requests(chromium: Chrome, page: str) -> list[str]:
    """What the page asked for, itself the first."""
    entries: list[dict[str, Any]] = [
        json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")
    ]
    sent = [entry["params"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
    return [request["request"]["url"] for request in sent if request["documentURL"] == page]


def test_a_browser_draws_every_plot_without_an_error_or_a_request(chromium: Chrome, tmp_path: Path) -> None:
    history = merge(restarted())
    painted = opened(chromium, tmp_path, html(history, config()))
    assert len(painted) == 6
    assert min(painted) > 100
    assert [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"] == []
    address = (tmp_path / "report.html").as_uri()
    assert [url for url in requests(chromium, address) if not url.startswith("data:")] == [address]


def test_a_browser_draws_ten_thousand_steps_and_gaps_where_a_loss_is_no_number(
    chromium: Chrome, tmp_path: Path
) -> None:
    many = steps(1, 10_000)
    many[5] = step(6, loss=math.nan, grad_norm=math.inf)
    painted = opened(chromium, tmp_path, html(merge({1: [started(10_000), *many]})))
    assert len(painted) == 5
    assert min(painted) > 100
    assert chromium.get_log("browser") == []


def test_a_browser_draws_the_first_step_alone(chromium: Chrome, tmp_path: Path) -> None:
    assert min(opened(chromium, tmp_path, html(merge({1: [started(9), step(1)]})))) > 10
    assert chromium.get_log("browser") == []


def test_the_plots_follow_the_colour_scheme(chromium: Chrome, tmp_path: Path) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    opened(chromium, tmp_path, html(merge({1: whole_run()})))
    background = "return getComputedStyle(document.body).backgroundColor"
    plot = 'return document.querySelector("#plots canvas").toDataURL()'
    set_scheme(chromium, "light")
    light_page, light_plot = chromium.execute_script(background), chromium.execute_script(plot)
    set_scheme(chromium, "dark")
    assert chromium.execute_script(background) != light_page
    WebDriverWait(chromium, 20).until(lambda _: chromium.execute_script(plot) != light_plot)


def set_scheme(chromium: Chrome, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def test_the_payload_names_phases_checkpoints_and_restarts() -> None:
    drawn = payload(merge(restarted()))
    assert drawn["phases"] == [{"name": "instruct", "first": 1, "last": 7}, {"name": "skills", "first": 8, "last": 20}]
    assert (drawn["checkpoints"], drawn["restarts"]) == ([5, 7], [6, 8])
