/*
 * torture MODE FORMAT FROM TO [N]: disk images under stress, a run for each seed from FROM to before TO.
 *
 *   differential    random operations against plain bytes; every N-th also against qemu-img and qemu-io
 *   kill            a writer that is killed at a random instant
 *   powercut        what a power cut could have left
 *   faults          each N-th call to the file fails once
 *
 * Prints how many runs there were; status 1 and the seed where one went wrong, 77 where the format cannot be written.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "torture.h"

int main(int argc, char **argv)
{
	uint64_t from, to;
	unsigned n;
	int runs;

	if (argc < 5) {
		fprintf(stderr, "usage: torture differential|kill|powercut|faults FORMAT FROM TO [N]\n");
		return 2;
	}
	from = strtoull(argv[3], NULL, 0);
	to = strtoull(argv[4], NULL, 0);
	n = argc > 5 ? (unsigned)strtoul(argv[5], NULL, 0) : 0;
	if (!image_can_create(argv[2]) || !image_can_write(argv[2])) {
		printf("format %s cannot be written here\n", argv[2]);
		return 77;
	}
	if (!strcmp(argv[1], "differential"))
		runs = mode_differential(argv[2], from, to, n);
	else if (!strcmp(argv[1], "kill"))
		runs = mode_kill(argv[2], from, to);
	else if (!strcmp(argv[1], "powercut"))
		runs = mode_powercut(argv[2], from, to);
	else if (!strcmp(argv[1], "faults"))
		runs = mode_faults(argv[2], from, to, n);
	else
		return 2;
	printf("%s %s: %d runs\n", argv[1], argv[2], runs);
	return 0;
}
