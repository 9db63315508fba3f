/* vmm disk: the subcommands and their options. disk.h says how they are run. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include "cli.h"
#include "disk.h"
#include "replay.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/log.h"
#include "vmm/opts.h"

#define LOOK_MEMORY  (256ull << 20)
#define LOOK_SECONDS 60
#define THREADS_MAX  64

#define AT(field)    offsetof(struct disk_args, field)
#define FLAG(l, name, field, words)         { l, name, OPTION_FLAG, AT(field), NULL, words }
#define TEXT(l, name, field, value, words)  { l, name, OPTION_TEXT, AT(field), value, words }
#define SIZE(l, name, field, value, words)  { l, name, OPTION_SIZE, AT(field), value, words }
#define NUM(l, name, field, value, words)   { l, name, OPTION_NUMBER, AT(field), value, words }

#define FORMAT       TEXT('f', "format", format, "FMT", "format of FILE ('vmm disk formats'); never guessed")
#define QUIET        FLAG('q', "quiet", quiet, "say nothing but errors")
#define SANDBOX      TEXT(0, "sandbox", sandbox, "on|off|log", "confinement of the process that reads images (on)")
#define SHARE        FLAG('U', "share", share, "do not lock: look although a VM writes to it")
#define BACKING_RULE                                                                               \
	TEXT(0, "backing", backing_rule, "allow|DIR", "backing files may be read: beside FILE, or below DIR")
#define JSON                                                                                       \
	FLAG(0, "json", json, "as JSON"),                                                          \
	TEXT(0, "output", output, "human|json", "the same, as qemu-img spells it")
#define PREALLOC     TEXT(0, "preallocate", prealloc, "HOW", "off, metadata, falloc or full")
#define PROGRESS     FLAG('p', "progress", progress, "show how far it is")

static const struct disk_option create_options[] = {
	TEXT('f', "format", format, "FMT", "format to make (raw; 'vmm disk formats')"),
	TEXT('o', "options", options, "K=V,...", "cluster_size=64k, compression_type=zstd, ...: vmm-disk(1)"),
	TEXT('b', "backing-file", backing, "FILE", "make an overlay over FILE, which is seen from the new one"),
	TEXT('F', "backing-format", backing_format, "FMT", "format of the backing file"),
	PREALLOC, QUIET, SANDBOX,
};
static const struct disk_option info_options[] = {
	TEXT('f', "format", format, "FMT", "format of FILE; without it what it looks like is shown"),
	FLAG(0, "backing-chain", chain, "all images of the chain (with --backing)"),
	BACKING_RULE, JSON, SHARE, SANDBOX,
};
static const struct disk_option check_options[] = {
	FORMAT,
	{ 'r', "repair", OPTION_OPTIONAL, AT(repair), "leaks|all", "mend it: only leaks, or all" },
	JSON, SHARE, QUIET, SANDBOX,
};
static const struct disk_option convert_options[] = {
	TEXT('f', "format", format, "FMT", "format of SRC; never guessed"),
	TEXT('O', "out-format", out_format, "FMT", "format of DST (raw)"),
	TEXT('o', "options", options, "K=V,...", "as with create"),
	FLAG('c', "compress", compress, "compress the data (formats that can)"),
	TEXT('B', "backing-file", backing, "FILE", "make DST an overlay: it gets only what differs from FILE"),
	TEXT('F', "backing-format", backing_format, "FMT", "format of that FILE"),
	SIZE('S', "sparse", sparse, "SIZE", "look for zeroes in pieces of SIZE (4k); 0: write them"),
	NUM('m', "threads", threads, "N", "threads that read (as many as CPUs)"),
	FLAG('W', "unordered", unordered, "write what is read first, in any order"),
	TEXT('l', "snapshot", snapshot, "NAME", "the disk as it was at an internal snapshot of SRC"),
	FLAG('n', "no-create", no_create, "DST is there: write into it"),
	PREALLOC, PROGRESS, BACKING_RULE, SHARE, QUIET, SANDBOX,
};
static const struct disk_option resize_options[] = {
	FORMAT, FLAG(0, "shrink", shrink, "cut off what is beyond SIZE"), PREALLOC, QUIET, SANDBOX,
};
static const struct disk_option snapshot_options[] = {
	FORMAT,
	FLAG('l', "list", snapshot_list, "list them (default)"),
	TEXT('c', "create", snapshot_create, "NAME", "make one of what the disk holds now"),
	TEXT('a', "apply", snapshot_apply, "NAME", "make the disk what it was then"),
	TEXT('d', "delete", snapshot_delete, "NAME", "delete one"),
	JSON, SHARE, QUIET, SANDBOX,
};
static const struct disk_option commit_options[] = {
	FORMAT,
	TEXT('b', "backing-file", backing, "FILE", "the backing file, named so that it may be written to"),
	FLAG('d', "keep", keep, "do not empty FILE afterwards"),
	PROGRESS, BACKING_RULE, QUIET, SANDBOX,
};
static const struct disk_option rebase_options[] = {
	FORMAT,
	TEXT('b', "backing-file", backing, "FILE", "the new backing file, '' for none"),
	TEXT('F', "backing-format", backing_format, "FMT", "its format"),
	FLAG('u', "unsafe", unsafe, "only change the name: both have the same content"),
	PROGRESS, BACKING_RULE, QUIET, SANDBOX,
};
static const struct disk_option map_options[] = { FORMAT, BACKING_RULE, JSON, SHARE, SANDBOX };
static const struct disk_option compare_options[] = {
	TEXT('f', "format", format, "FMT", "format of A; never guessed"),
	TEXT('F', "second-format", out_format, "FMT", "format of B"),
	FLAG('s', "strict", strict, "other sizes, or space allocated elsewhere, are a difference"),
	PROGRESS, BACKING_RULE, SHARE, QUIET, SANDBOX,
};
static const struct disk_option bench_options[] = {
	FORMAT,
	NUM('c', "count", count, "N", "requests (75000)"),
	NUM('d', "depth", depth, "N", "requests at once, each a thread (1; reads only)"),
	SIZE('s', "size", request, "SIZE", "bytes of a request (4k)"),
	FLAG('w', "write", write, "write zeroes: destroys what is there"),
	TEXT('t', "cache", cache, "MODE", "with -w: writeback, writethrough or unsafe (writeback)"),
	BACKING_RULE, JSON, SHARE, SANDBOX,
};

#define OPTIONS(table) .options = table, .nr_options = ARRAY_LEN(table)
static const struct disk_command commands[] = {
	{ .name = "create", .brief = "make an image", .usage = "FILE [SIZE]",
		.words = "Make an image. SIZE: 512, 64M, 10G; that of the backing file where there is one.",
		OPTIONS(create_options), .least = 1, .most = 2, .prepare = create_prepare, .work = create_work },
	{ .name = "info", .brief = "what it says about itself", .usage = "FILE",
		.words = "What an image says about itself.",
		OPTIONS(info_options), .least = 1, .most = 1, .memory = LOOK_MEMORY, .cpu_seconds = LOOK_SECONDS,
		.prepare = info_prepare, .work = info_work },
	{ .name = "check", .brief = "is its metadata sound?", .usage = "FILE",
		.words = "Check the metadata. Status: 0 clean, 1 could not be done, 2 corrupt, 3 leaks, 63 the format has no "
			"check.",
		OPTIONS(check_options), .least = 1, .most = 1, .memory = LOOK_MEMORY, .prepare = check_prepare,
		.work = check_work },
	{ .name = "convert", .brief = "into any other format", .usage = "SRC... DST",
		.words = "Copy disks, one behind the other, into an image of any format. DST is removed if it does not get "
			"complete.",
		OPTIONS(convert_options), .least = 2, .most = DISK_FILES - 2, .prepare = convert_prepare,
		.work = convert_work },
	{ .name = "resize", .brief = "change the size", .usage = "FILE [+|-]SIZE", .words = "Change the size of a disk.",
		OPTIONS(resize_options), .least = 2, .most = 2, .prepare = resize_prepare, .work = resize_work },
	{ .name = "snapshot", .brief = "internal snapshots", .usage = "[list|create NAME|apply NAME|delete NAME] FILE",
		.words = "Internal snapshots.",
		OPTIONS(snapshot_options), .least = 1, .most = 3, .prepare = snapshot_prepare, .work = snapshot_work },
	{ .name = "commit", .brief = "an overlay into its backing file", .usage = "FILE",
		.words = "Write what an overlay holds into its backing file, then empty it.",
		OPTIONS(commit_options), .least = 1, .most = 1, .prepare = commit_prepare, .work = commit_work,
		.finish = commit_finish },
	{ .name = "rebase", .brief = "another backing file", .usage = "FILE",
		.words = "Give an overlay another backing file; its disk stays what it is.",
		OPTIONS(rebase_options), .least = 1, .most = 1, .prepare = rebase_prepare, .work = rebase_work },
	{ .name = "map", .brief = "where the data lies", .usage = "FILE", .words = "Where the data of a disk lies.",
		OPTIONS(map_options), .least = 1, .most = 1, .memory = LOOK_MEMORY, .cpu_seconds = LOOK_SECONDS,
		.prepare = info_prepare, .work = map_work },
	{ .name = "compare", .brief = "do two disks hold the same?", .usage = "A B",
		.words = "Status: 0 the same, 1 they differ, 2 could not be done.",
		OPTIONS(compare_options), .least = 2, .most = 2, .failed = 2, .prepare = compare_prepare,
		.work = compare_work },
	{ .name = "bench", .brief = "time requests", .usage = "FILE", .words = "Time requests, one behind the other.",
		OPTIONS(bench_options), .least = 1, .most = 1, .prepare = bench_prepare, .work = bench_work },
};

static int formats(int argc, char **argv)
{
	if (argc && (strcmp(argv[0], "--help") || argc > 1)) {
		log_error("disk formats: unexpected argument '%s': nothing may follow", argv[0]);
		return DISK_FAILED;
	}
	if (argc)
		printf("usage: vmm disk formats\nEach format, and what can be done with its images.\n");
	for (const char *const *f = image_formats(); !argc && *f; f++)
		printf("%-8s read%s%s\n", *f, image_can_write(*f) ? " write" : "", image_can_create(*f) ? " create" : "");
	return 0;
}

static void usage(FILE *f)
{
	fputs("usage: vmm disk COMMAND [OPTION]... FILE...\n\n", f);
	for (size_t i = 0; i < ARRAY_LEN(commands); i++)
		fprintf(f, "  %-9s %-46s %s\n", commands[i].name, commands[i].usage, commands[i].brief);
	fprintf(f, "  %-9s %-46s %s\n", "replay", "--log FILE --out PATH ...", "disks that a power cut could have left");
	fprintf(f, "  %-9s %-46s %s\n\n", "formats", "", "what this binary knows");
	fputs(
		"'vmm disk COMMAND --help' lists the options: those of qemu-img, where it has them.\n"
		"A format is said with -f, never guessed; without -f it is raw, and refused if it looks like another one.\n"
		"Backing files are read only with --backing=allow (beside the image) or --backing=DIR (below DIR).\n"
		"Status: 0 done, 1 it could not be done; check and compare have more.\n", f);
}

static int check_common(struct disk_args *a, struct error *err)
{
	static const char *const modes[] = { [SANDBOX_OFF] = "off", [SANDBOX_ON] = "on", [SANDBOX_LOG] = "log" };

	a->mode = SANDBOX_ON;
	if (a->sandbox) {
		unsigned m = 0;

		while (m < ARRAY_LEN(modes) && strcmp(modes[m], a->sandbox))
			m++;
		if (m == ARRAY_LEN(modes))
			return error_set(err, EINVAL, "--sandbox %s: expected on, off or log", a->sandbox);
		a->mode = (enum sandbox_mode)m;
	}
	if (a->threads > THREADS_MAX || a->depth > THREADS_MAX)
		return error_set(err, EINVAL, "at most %u threads", THREADS_MAX);
	if (a->sparse % 512 || a->sparse > 1 << 20)
		return error_set(err, EINVAL, "-S: a multiple of 512 up to 1M, or 0");
	return 0;
}

static int run(const struct disk_command *c, int argc, char **argv)
{
	static struct disk_args a;
	struct error err = { 0 };
	int r;

	a = (struct disk_args){ .command = c, .sparse = 4096, .count = 75000, .depth = 1, .request = 4096,
		.minus = c->work == resize_work };
	for (unsigned k = 0; k < DISK_FILES; k++)
		a.file[k].fd = -1;
	r = disk_parse(&a, argc, argv, &err);
	if (!r && a.help) {
		disk_command_usage(c);
		return 0;
	}
	r = r ? r : check_common(&a, &err);
	if (r) {
		log_error("disk %s: %s", c->name, err.msg);
		return disk_failed(c);
	}
	return disk_run(&a);
}

int cmd_disk(int argc, char **argv)
{
	if (argc && (!strcmp(argv[0], "--help") || !strcmp(argv[0], "-h") || !strcmp(argv[0], "help"))) {
		usage(stdout);
		return 0;
	}
	if (!argc) {
		usage(stderr);
		return DISK_FAILED;
	}
	if (!strcmp(argv[0], "formats"))
		return formats(argc - 1, argv + 1);
	if (!strcmp(argv[0], "replay"))
		return disk_replay(argc - 1, argv + 1);
	for (size_t i = 0; i < ARRAY_LEN(commands); i++)
		if (!strcmp(argv[0], commands[i].name))
			return run(&commands[i], argc - 1, argv + 1);
	log_error("disk: unknown command '%s': expected create, info, check, convert, resize, snapshot, commit, rebase, map, "
		"compare, bench, replay or formats", argv[0]);
	return DISK_FAILED;
}
