#!/usr/bin/env bash
# TextVQA val, 5,000 questions, with the dataset's OCR tokens in the prompt (PROTOCOL=no-ocr: without).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate textvqa textvqa "$@"
