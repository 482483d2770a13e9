#!/usr/bin/env bash
# OUT (dist)/*.whl with the compiled kernels inside: one for any Python and torch, on any x86-64 CPU and any NVIDIA GPU since
# sm_75. Needs g++ and nvcc here, and neither where the wheel is installed. CUDA=none leaves the CUDA kernels out.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
cp -r visualrwkv README.md LICENSE NOTICE "$stage"
find "$stage" -name __pycache__ -prune -exec rm -r {} +
mkdir "$stage/visualrwkv/_cuda"
cp cuda/* "$stage/visualrwkv/_cuda"
echo "kernels (for all GPUs this takes minutes)"
python -m visualrwkv.ops.build --into "$stage/visualrwkv/_kernels" --cuda "${CUDA:-all}"
# What the libraries need of glibc is what the wheel may promise.
glibc=$(objdump -T "$stage"/visualrwkv/_kernels/*.so | grep -o 'GLIBC_2\.[0-9]*' | sort -uV | tail -1)
sed -e 's/^visualrwkv = \["hf/visualrwkv = ["_cuda\/*", "_kernels\/*", "hf/' pyproject.toml >"$stage/pyproject.toml"
printf '[bdist_wheel]\nplat_name = manylinux_%s_%s\npython_tag = py3\n' "$(tr . _ <<<"${glibc#GLIBC_}")" "$(uname -m)" >"$stage/setup.cfg"
python -m pip wheel -q --no-deps --no-build-isolation -w "${OUT:-dist}" "$stage"
ls -sh "${OUT:-dist}"/*.whl
