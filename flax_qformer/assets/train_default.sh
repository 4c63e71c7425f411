#!/usr/bin/env bash
# Make the embedded default model: `bash flax_qformer/assets/train_default.sh DIR`, in a checkout with `.[train]`
# installed. DIR keeps the data and the runs. `python benchmarks/shapes.py` then prints what the model has learned.
#
# The first run sees images of one object, the second of two. Two at once are too hard to begin with: what a word means
# is learned where nothing else can be meant, and to look for it where there is a choice.
set -euo pipefail

folder=$1
assets=$(dirname "$0")

run() {
    flax-qformer train --data "$folder/$1" --model "$2" --output "$folder/run_$1" --steps "$3" --batch-size "$4" \
        --train all --learning-rate 2e-3 --dtype float32 --max-text-length 12 --crop-scale 1 1 --num-workers 1 \
        --held-out 0.01 --evaluate-on 100 --rerank 0 --seed 0
}

python -m flax_qformer.assets.make "$folder/start"
python -m flax_qformer.assets.shapes "$folder/one" --objects 1 --images 12000 --seed 1
python -m flax_qformer.assets.shapes "$folder/two" --objects 2 --images 20000 --seed 2
run one "$folder/start" 800 32
run two "$folder/run_one/model" 3300 32
flax-qformer export "$folder/run_two/model" "$assets/default" --layout diffusers --overwrite
