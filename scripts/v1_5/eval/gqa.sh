#!/usr/bin/env bash
# GQA testdev balanced, 12,578 questions.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate gqa gqa "$@"
