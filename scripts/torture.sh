#!/bin/sh
# Disk images under stress, at length: make torture. COUNT scales it (1: about an hour on 2 cores).
# A format that goes wrong keeps its image and says its seed; the other runs go on.
set -u
cd "$(dirname "$0")/.."
torture=${BUILD:-build}/tests/torture/torture
count=${COUNT:-1}
failed=0

run()
{
	echo "== torture $*"
	"$torture" "$@"
	case $? in
	0 | 77) ;;
	*) failed=$((failed + 1)) ;;
	esac
}

for format in qcow2 vdi raw; do
	run differential $format 0 $((10000 * count)) 10
	run kill $format 0 $((10000 * count))
	run powercut $format 0 $((400 * count))
	run faults $format 0 $count 1
done
# Images with fields changed: 20,000 of each format and more, under sanitizers.
meson=$(command -v /usr/bin/meson || echo meson)
[ -e build-san/build.ninja ] || CC=clang "$meson" setup build-san -Db_sanitize=address,undefined -Db_lundef=false >/dev/null
ninja -C build-san --quiet || exit 1
for format in qcow2 qcow2check vdi vhd vmdk vhdx; do
	echo "== 20,000 mutated images: $format"
	files=$(ls tests/fuzz/corpus/$format | wc -l)
	MUTATIONS=$((20000 * count / files + 1)) build-san/tests/fuzz/corpus_$format tests/fuzz/corpus/$format ||
		failed=$((failed + 1))
done
[ $failed = 0 ] && echo "torture: all passed" || echo "torture: $failed of 18 failed"
exit $((failed != 0))
