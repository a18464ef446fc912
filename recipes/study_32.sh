#!/bin/sh
# ECAR against DiT of the same size at 32x32: the same latents in the same order, the same training FLOPs.
#
#     sh recipes/study_32.sh fashion runs/fashion/data/train.parquet runs/fashion/data/test.parquet
#     sh recipes/study_32.sh cifar10 train.parquet test.parquet
#
# After recipes/fashion.sh or recipes/cifar10.sh, whose folder it goes on in. Every command resumes.
# Six and a half minutes of an H100 for DiT; a minute of an H200 for each Neon training; curves of N = 1,000 take an
# hour of a CPU core. recipes/matched.py trains such pairs from latents alone, several seeds on several cores.
set -eu
name=$1 train=$2 test=$3
runs=${RUNS:-runs/$name}
case $name in
cifar10)
    steps=6109 flip=--flip scale=2.1
    ecar='2,2 3,2 4,2 4,3 5,3 6,4' own=4,3
    dit='5:2:ab2:0.4 7:2:ab2:0.4 10:2:ab2:0.4 25:2:ab2:0.4' best=25:2:ab2:0.4  # guided from t = 0.4 on
    ;;
fashion)
    steps=6335 flip= scale=1.5
    ecar='2,1 3,2 4,2 4,3 5,3 6,4' own=5,3
    dit='5 7 10 25' best=25
    ;;
*)
    echo "study_32.sh: give cifar10 or fashion, not $name" >&2
    exit 2
    ;;
esac

# DiT: as many steps as cost ECAR's training FLOPs.
ecar train --data "$runs/latents" $flip --out "$runs/dit" --preset dit-nano --compile \
    --optimizer muon --lr 2e-3 --batch-size 512 --stage-share 1 --max-steps $steps --decay 0.4 --seed 2 \
    --ema 0.99 0.999

# Whatever one side gets, the other gets: Neon, with the scale that was best against training images.
for seed in 10 11; do
    ecar train --init-from "$runs/dit/final" --data self:24576 --seed $seed --out "$runs/dit$seed" \
        --optimizer muon --lr 3e-4 --max-steps 400 --batch-size 256 --decay 0.8 --ema 0.97
done
[ -d "$runs/dit_away" ] || ecar neon "$runs/dit/final" --scale $scale --out "$runs/dit_away" \
    --trained "$runs/dit10/final" "$runs/dit11/final"

for model in dit dit_away; do
    from=$runs/$model
    [ $model = dit ] && from=$runs/dit/final
    python recipes/bundle.py --model "$from" --decoder "$runs/sharp" --out "$runs/${model}_bundled"
done

# Curves of quality against sampling cost; then what follows from them, by rule.
curve() {
    model=$1 out=$2 num=$3; shift 3
    python benchmarks/curve.py --model "$model" --data "$test" --train-data "$train" \
        --classifier "$runs/judge.safetensors" --num "$num" --settings "$@" --out "$runs/$out.jsonl"
}
curve "$runs/$name" ecar_1000 1000 $ecar
curve "$runs/dit_away_bundled" dit_neon_1000 1000 $dit
curve "$runs/$name" ecar 10000 $own
curve "$runs/dit_bundled" dit 10000 $best
curve "$runs/dit_away_bundled" dit_neon 10000 $best
# Seconds need a quiet machine.
python benchmarks/seconds.py --ecar "$runs/ecar_1000.jsonl" --ecar-model "$runs/$name" \
    --dit "$runs/dit_neon_1000.jsonl" --dit-model "$runs/dit_away_bundled" --out "$runs/seconds.json"
python benchmarks/compare.py --ecar "$runs/ecar_1000.jsonl" --dit "$runs/dit_neon_1000.jsonl" \
    --seconds "$runs/seconds.json" --name comparison --out "$runs"

# Pictures of both, not selected, and what choosing among candidates is worth to either.
python benchmarks/side_by_side.py --systems "ECAR=$runs/$name=$own" "DiT=$runs/dit_away_bundled=$best" --data "$test" \
    --out "$runs/side_by_side.png"
choose() {
    model=$1 out=$2; shift 2
    [ -f "$runs/$out.jsonl" ] || python benchmarks/candidates.py --model "$model" --data "$test" --train-data "$train" \
        --classifier "$runs/judge.safetensors" --compile --out "$runs/$out.jsonl" "$@"
}
choose "$runs/$name" candidates_ecar
choose "$runs/dit_away_bundled" candidates_dit --setting $best
python benchmarks/candidates_plot.py --system ECAR "$runs/candidates_ecar.jsonl" \
    --system DiT "$runs/candidates_dit.jsonl" --out "$runs/candidates.png"
