#!/usr/bin/env bash
# Make the embedded default model: `bash examples/shapes/train_default.sh DIR`, in a checkout with `.[train]`
# installed. DIR keeps the data and the runs. `PYTHONPATH=examples/shapes python benchmarks/shapes.py` then prints what
# the model has learned.
#
# The first run sees images of one object, so that each word is unambiguous; the second sees two objects, and has to look
# at the named one. Both take many steps with small batches. The other runs read more captions of two objects, in larger
# batches: similar images teach shapes and sizes, and are rare in small batches. The last run also reads names as users
# type them: "red circle".
set -euo pipefail

folder=${1:?usage: bash train_default.sh DIR}
here=$(dirname "$0")

run() {
    local name=$1 start=$2
    shift 2
    flax-qformer train --data "$folder/$name" --model "$start" --output "$folder/run_$name" "$@" \
        --train all --learning-rate 1.5e-3 --dtype float32 --max-text-length 12 --crop-scale 1 1 --num-workers 1 \
        --save-every 2000 --held-out 0.01 --evaluate-on 100
}

python "$here/start.py" "$folder/start"
python "$here/scenes.py" "$folder/one" --objects 1 --images 20000 --seed 1
python "$here/scenes.py" "$folder/two" --objects 2 --images 20000 --seed 2
python "$here/scenes.py" "$folder/pairs" --objects 2 --images 20000 --seed 3 --pairs 12
python "$here/scenes.py" "$folder/more" --objects 2 --images 20000 --seed 4 --pairs 6
python "$here/scenes.py" "$folder/bare" --objects 2 --images 20000 --seed 5 --pairs 8 --bare
run one "$folder/start" --steps 5000 --batch-size 8 --seed 0
run two "$folder/run_one/model" --steps 12000 --batch-size 8 --seed 1
run pairs "$folder/run_two/model" --steps 6000 --batch-size 32 --seed 1 --dropout 0.1 --ema-decay 0.999
run more "$folder/run_pairs/model" --steps 6000 --batch-size 32 --seed 2 --dropout 0.1 --ema-decay 0.999
run bare "$folder/run_more/model" --steps 6000 --batch-size 32 --seed 3 --dropout 0.1 --ema-decay 0.999
flax-qformer export "$folder/run_bare/model" "$here/../../flax_qformer/assets/default" --layout diffusers --overwrite
# The drawing pipeline around it, which the export removed with the old model.
python "$here/tiny_pipeline.py"
