/*
 * Runs a fuzz harness without a fuzzer: every file of the corpus directory given, then seeded mutations of
 * each: 400, or as many as the environment's MUTATIONS says. The seed is fixed, so a failure repeats.
 */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define INPUT_MAX (1u << 20)
#define MUTATIONS 400

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t rng = 0x9e3779b97f4a7c15ull;

static uint64_t next_random(void)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	rng ^= rng << 17;
	return rng;
}

static void run(const uint8_t *data, size_t size)
{
	/* An exact heap copy: a sanitizer sees the first byte read past the end. */
	uint8_t *copy = malloc(size ? size : 1);

	if (!copy)
		exit(99);
	memcpy(copy, data, size);
	LLVMFuzzerTestOneInput(copy, size);
	free(copy);
}

static size_t mutate(uint8_t *buf, size_t size)
{
	static const uint64_t edges[] = { 0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fffffff, 0x80000000,
		0xffffffff, 0x7fffffffffffffff, 0xffffffffffffffff };
	unsigned n = 1 + next_random() % 4;

	while (n-- && size) {
		size_t at = next_random() % size;
		size_t width = 1u << next_random() % 4;

		switch (next_random() % 4) {
		case 0:
			buf[at] ^= 1u << next_random() % 8;
			break;
		case 1:
			buf[at] = next_random();
			break;
		case 2:
			if (width > size - at)
				width = size - at;
			memcpy(buf + at, &edges[next_random() % (sizeof(edges) / sizeof(edges[0]))],
				width);
			break;
		case 3:
			if (next_random() % 8 == 0)
				size = at;
			break;
		}
	}
	return size;
}

int main(int argc, char **argv)
{
	static uint8_t input[INPUT_MAX], work[INPUT_MAX];
	const char *many = getenv("MUTATIONS");
	int mutations = many ? atoi(many) : MUTATIONS;
	unsigned files = 0;
	struct dirent *e;
	DIR *d;

	if (argc != 2 || !(d = opendir(argv[1]))) {
		fprintf(stderr, "usage: %s CORPUS-DIRECTORY\n", argv[0]);
		return 99;
	}
	while ((e = readdir(d))) {
		char path[4096];
		size_t size;
		FILE *f;

		if (e->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "%s/%s", argv[1], e->d_name);
		f = fopen(path, "rb");
		if (!f)
			return 99;
		size = fread(input, 1, sizeof(input), f);
		fclose(f);
		files++;
		run(input, size);
		for (int i = 0; i < mutations; i++) {
			memcpy(work, input, size);
			run(work, mutate(work, size));
		}
	}
	closedir(d);
	if (!files) {
		fprintf(stderr, "%s: no corpus in %s\n", argv[0], argv[1]);
		return 99;
	}
	printf("%u files, %d mutations each\n", files, mutations);
	return 0;
}
