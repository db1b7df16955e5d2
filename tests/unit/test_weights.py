"""Weights of another model are refused; those of a model.json from before a setting was there are not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_octo.config.base import to_dict
from megatron_octo.errors import BadInput
from megatron_octo.model.weights import MODEL_FILE, check_shape
from megatron_octo.rundir import write_json
from tests.prepared import MODEL


def test_a_field_that_differs_is_named(tmp_path):
    write_json(tmp_path / MODEL_FILE, to_dict(MODEL))
    check_shape(replace(MODEL, max_positions=128, init_std=0.5), tmp_path)
    with pytest.raises(BadInput, match=r"model\.num_layers: 4 there, 8 asked for"):
        check_shape(replace(MODEL, num_layers=8), tmp_path)


def test_a_field_that_is_newer_than_the_weights_has_its_default(tmp_path):
    write_json(tmp_path / MODEL_FILE, {name: value for name, value in to_dict(MODEL).items() if name != "qk_norm"})
    check_shape(MODEL, tmp_path)
    with pytest.raises(BadInput, match=r"model\.qk_norm: False there, True asked for"):
        check_shape(replace(MODEL, qk_norm=True), tmp_path)
