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
	run faults $format 0 $((2 * count)) 1
done
[ $failed = 0 ] && echo "torture: all passed" || echo "torture: $failed of 12 failed"
exit $((failed != 0))
