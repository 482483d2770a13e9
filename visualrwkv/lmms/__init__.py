"""lmms-eval's door: `lmms-eval --model visualrwkv --model_args pretrained=DIR --tasks mme,pope`."""
