"""Sections: one list; whatever books, draws or describes sections follows it, and so does the prose."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fl_sim import codecs
from fl_sim.codecs import Schema
from fl_sim.codecs.sections import BODY, BOOKED, CODEC, HEADER, KINDS, SECTION_OF
from fl_sim.communication.exchange import CONTENTS, Coding
from fl_sim.communication.ledger import WORDS
from fl_sim.config.catalogue import catalogue
from fl_sim.config.reference import documented
from fl_sim.report.charts import TRAFFIC_COLOURS
from fl_sim.report.flows import TRAFFIC_KINDS


def test_a_payload_with_everything_has_every_section_and_no_other() -> None:
    params = {name: torch.rand(40) for name in ("w", "b", "bn.running_mean", "curve")}
    schema = Schema.of(params, ["w"], auxiliary=["curve"])
    assert schema.kinds == KINDS
    mask = {"w": torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.3}
    sections = codecs.describe(codecs.encode(params, mask, schema=schema), schema=schema).sections
    assert list(sections) == [*BODY, HEADER]
    assert sorted(sections) == sorted(BOOKED)
    assert {SECTION_OF[kind] for kind in schema.kinds} == sections.keys() - {"mask", "header"}


def test_ledger_and_report_have_the_sections_of_the_codecs() -> None:
    assert WORDS["section"] == (*BOOKED, "config", "metrics", CODEC), (
        "two of foreign Flower apps, one of codecs of one's own"
    )
    assert TRAFFIC_KINDS[: len(BOOKED)] == BOOKED
    assert tuple(TRAFFIC_COLOURS) == TRAFFIC_KINDS


def test_the_glossary_and_the_accounting_page_name_every_section() -> None:
    (meaning,) = re.findall(r"^\| section \| a part of a payload: (.*) \|$", Path("CONTRIBUTING.md").read_text(), re.M)
    assert sorted(meaning.split(", ")) == sorted(BOOKED)
    page = Path("docs/accounting.md").read_text(encoding="utf-8")
    assert [section for section in BOOKED if f"`{section}`" not in page] == []


def test_the_config_lists_every_value_type_and_content() -> None:
    described = documented(Coding)
    assert described["values"].removeprefix("value type: ").split(", ") == list(codecs.VALUES)
    assert all(f'"{name}"' in described["content"] for name in CONTENTS)
    assert catalogue()["contents"].keys() == CONTENTS.keys()
