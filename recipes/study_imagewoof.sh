#!/bin/sh
# A second data set at 256x256: ECAR and DiT on ImageWoof, ten breeds of dogs of ImageNet, with the bundled tokenizer.
#
#     sh recipes/study_imagewoof.sh TRAIN VALIDATION
#
# ECAR is made by the ImageNet recipe, scaled down by its own options; DiT has the same latents in the same order and the
# same training FLOPs. Each training takes 50 minutes of a CPU core with bfloat16. The same command goes on where it was
# stopped. Needs: pip install ".[all]" stlpips-pytorch.
set -eu
train=$1 validation=$2
runs=${RUNS:-runs/imagewoof}

ecar encode --data "$validation" --tokenizer photographs --resolution 256 --out "$runs/held_out"

# Latents, 2,000 steps (24.82 epochs), samples, figures and card. --processes 2 gives the same on two cores.
python recipes/imagenet256.py --data "$train" --reference "$train" --extractor efficientnet-lite0 \
    --tokenizer photographs --preset 256x4x1+6/2 --stages 2 --steps 6 4 --guidance 5 8 \
    --processes "${PROCESSES:-1}" --shard-size 128 --batch-size 112 --accumulate 1 --epochs 24.82 --lr 2e-3 \
    --num 1000 --sample-batch 50 --out "$runs" --repo-id owner/imagewoof \
    --train="--compile --optimizer muon --decay 0.4 --ema 0.99 0.998 --stage-share 1 0.5 --val-data $runs/held_out" \
    --evaluate="--allow-small"

# As many steps as cost the training FLOPs of ECAR.
ecar train --data "$runs/latents" --flip --out "$runs/dit" --resolution 256 --preset dit-256x4x1+6/2 \
    --compile --optimizer muon --lr 2e-3 --batch-size 112 --max-steps 1531 --decay 0.4 --ema 0.99 0.998 \
    --val-data "$runs/held_out"

# Distances to the training photographs, of which there are enough; the floor is the held-out ones.
curve() {
    out=$1; shift
    python benchmarks/curve.py --data "$train" --train-data "$validation" --out "$runs/$out.jsonl" "$@"
}
# Guidance, by samples of other seeds: the strongest was best on both sides.
curve ecar_guidance --model "$runs/model/final" --num 300 --seed 10000 --settings 6,4:2,3 6,4:3,5 6,4:5,8
curve dit_guidance --model "$runs/dit/final" --num 300 --seed 10000 --settings 10:2 10:3.5 10:5.5
curve ecar --model "$runs/model/final" --vgg --num 500 --settings 4,3:5,8 6,4:5,8 12,8:5,8
curve dit --model "$runs/dit/final" --vgg --num 500 --settings 5:5.5 10:5.5 25:5.5

# Seconds need a quiet machine.
python benchmarks/seconds.py --ecar "$runs/ecar.jsonl" --ecar-model "$runs/model/final" --dit "$runs/dit.jsonl" \
    --dit-model "$runs/dit/final" --images 16 --out "$runs/seconds.json"
python benchmarks/compare.py --ecar "$runs/ecar.jsonl" --dit "$runs/dit.jsonl" --seconds "$runs/seconds.json" \
    --name comparison --out results/imagewoof
python benchmarks/side_by_side.py --systems "ECAR=$runs/model/final=6,4:5,8" "DiT=$runs/dit/final=25:5.5" \
    --data "$validation" --per-class 2 --out results/imagewoof/side_by_side.jpg
