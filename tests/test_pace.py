"""What `visualrwkv bench` refuses before it makes a model."""

import pytest

from visualrwkv.pace import open_model


@pytest.mark.parametrize(
    ("device", "dtype", "sentence"),
    [("cuda", "int8", "'int8', which runs on a cpu, and the device is 'cuda'"), ("cpu", "fp8", "'fp8'; allowed are")],
)
def test_a_preset_in_a_dtype_that_is_not_there(device, dtype, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_model("rwkv6-nano", device, dtype)
