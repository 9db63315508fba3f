#ifndef CLI_DISK_H
#define CLI_DISK_H
/*
 * Inside vmm disk.
 *
 *   disk.c           the subcommands and their options as tables; dispatch
 *   disk_options.c   argv and -o texts into struct disk_args
 *   disk_child.c     files are opened here, images are read in a process that is shut in
 *   disk_make.c      create, resize, snapshot
 *   disk_chain.c     commit, rebase
 *   disk_show.c      info, check, map
 *   disk_progress.c  how far it is
 *   disk_compare.c   compare, bench
 *   disk_convert.c   convert: what goes where, in order
 *   disk_crew.c      threads that fetch and look for zeroes
 *
 * How this works. The parent reads the command line, opens the files that it names, and forks. The child gives up all
 * access to files and does the work on those descriptors; the parent only waits, opens backing files if --backing
 * allows them, and removes an output file that was not finished:
 *
 *      parent: options -> prepare(): opens -> fork -> serve() --------------------> remove or rename -> status
 *                                              |        ^ name        | descriptor
 *      child:                                  +-> sandbox_tool() -> work() ------> exit status
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include "vmm/image.h"
#include "vmm/sandbox.h"
struct error;
struct facts;

#define DISK_FILES 66           /* most files of one command */

/* Status of check (qemu-img's); 1 is any failure. */
enum { DISK_OK = 0, DISK_FAILED = 1, DISK_CORRUPT = 2, DISK_LEAKS = 3, DISK_UNSUPPORTED = 63 };

/* A file the command line names. */
struct disk_file {
	const char *path;
	int fd;                 /* -1: not opened */
	bool made;              /* by this command: removed if it fails */
};

struct disk_opener {
	struct image_opener ops;
	struct disk_args *args;
	unsigned first;         /* file the chain begins with */
};

struct disk_args {
	const struct disk_command *command;
	/* options, as the tables in disk.c name them */
	const char *format, *out_format, *options, *backing, *backing_format, *backing_rule, *prealloc, *output;
	const char *repair, *cache, *snapshot_create, *snapshot_apply, *snapshot_delete, *snapshot, *sandbox;
	bool help, quiet, json, chain, share, compress, progress, no_create, unordered, shrink, unsafe, strict, keep, write;
	bool snapshot_list;
	uint64_t sparse, threads, count, depth, request;
	/* positionals, then what options name */
	struct disk_file file[DISK_FILES];
	unsigned nr;            /* positionals */
	unsigned backing_at;    /* the file of -b or -B; 0: none */
	/* made from them */
	struct image_create create;
	uint64_t size;          /* create, resize */
	bool has_size;
	bool minus;             /* resize: "-1G" is no option */
	int sign;               /* resize: -1, 0 (absolute), 1 */
	enum sandbox_mode mode;
	bool tty;               /* stderr and stdout are a terminal */
	unsigned cpus;
	/* commit: the empty overlay that takes the place of the old one */
	char *fresh;            /* its path; NULL: none */
	int fresh_fd;
	/* child */
	struct disk_opener opener[DISK_FILES];
	int sock;
};

enum option_kind { OPTION_FLAG, OPTION_TEXT, OPTION_OPTIONAL, OPTION_SIZE, OPTION_NUMBER };
struct disk_option {
	char letter;            /* 0: none */
	const char *name;
	enum option_kind kind;
	size_t at;              /* in struct disk_args; OPTION_OPTIONAL: --name alone means "all" */
	const char *value;      /* as the usage calls it */
	const char *words;
};

struct disk_command {
	const char *name, *brief, *usage, *words;
	const struct disk_option *options;
	unsigned nr_options;
	unsigned least, most;   /* positionals */
	uint64_t memory;        /* bytes of address space; 0: 1 GiB */
	unsigned cpu_seconds;   /* 0: no limit */
	int failed;             /* status if it could not be done: 0: 1 */
	int (*prepare)(struct disk_args *a, struct error *err);         /* parent: 0 or -errno with words */
	int (*work)(struct disk_args *a, struct error *err);            /* child: status, or -errno with words: 1 */
	int (*finish)(struct disk_args *a, struct error *err);          /* parent, after status 0; may be NULL */
};

/* disk_options.c; main thread. 0 or -errno with words. */
int  disk_parse(struct disk_args *a, int argc, char **argv, struct error *err);
void disk_command_usage(const struct disk_command *c);
/* -o, --preallocate into a->create */
int  disk_parse_create(struct disk_args *a, const char *format, struct error *err);
/* -b, -F of the new image at path: opened as the last file. 0, also without -b, or -errno. */
int  disk_open_backing(struct disk_args *a, const char *path, struct error *err);
const char *disk_size_words(uint64_t bytes, char *buf, size_t len);     /* "1.5 GiB"; buf */

/* disk_child.c */
/* Open file k for reading, or writing too. A regular file or block device. 0 or -errno with words. */
int  disk_open_file(struct disk_args *a, unsigned k, bool write, struct error *err);
int  disk_open_new(struct disk_args *a, unsigned k, struct error *err); /* makes it where it is not there */
int  disk_run(struct disk_args *a);                     /* prepare, fork, serve; the status */

int  disk_failed(const struct disk_command *c);         /* the status that says so */

/* In the child. */
/* Open the image in file k; format NULL: raw, but refused where it looks like another one. */
int  disk_image(struct disk_args *a, struct image **ret, unsigned k, const char *format, struct image_how how,
	struct error *err);
/* The backing file of i, opened for writing by the parent if the command is commit. Descriptor or -errno with words. */
int  disk_backing_for_writing(struct disk_args *a, const struct image *i, struct error *err);
const char *disk_guess(const struct disk_args *a, unsigned k);          /* what the first bytes look like */
char *disk_beside(const char *from, const char *name);                 /* name as seen from the directory of from; free() */
void disk_print(FILE *f, const char *text);             /* control characters replaced */

/* A line of progress; zero-initialise. Percentages on stdout, a bar on a terminal. */
struct disk_progress {
	bool wanted, tty, shown;
	uint64_t total, start_ns, last_ns;
	unsigned last;
};
void disk_progress_start(struct disk_progress *p, const struct disk_args *a, uint64_t total);
void disk_progress_at(struct disk_progress *p, uint64_t done);
void disk_progress_end(struct disk_progress *p, bool complete);

/* disk_make.c … disk_convert.c */
int create_prepare(struct disk_args *a, struct error *err);
int create_work(struct disk_args *a, struct error *err);
int resize_prepare(struct disk_args *a, struct error *err);
int resize_work(struct disk_args *a, struct error *err);
int snapshot_prepare(struct disk_args *a, struct error *err);
int snapshot_work(struct disk_args *a, struct error *err);
int commit_prepare(struct disk_args *a, struct error *err);
int commit_work(struct disk_args *a, struct error *err);
int commit_finish(struct disk_args *a, struct error *err);
int rebase_prepare(struct disk_args *a, struct error *err);
int rebase_work(struct disk_args *a, struct error *err);
int info_prepare(struct disk_args *a, struct error *err);
int info_work(struct disk_args *a, struct error *err);
int check_prepare(struct disk_args *a, struct error *err);
int check_work(struct disk_args *a, struct error *err);
int map_work(struct disk_args *a, struct error *err);
int compare_prepare(struct disk_args *a, struct error *err);
int compare_work(struct disk_args *a, struct error *err);
int bench_prepare(struct disk_args *a, struct error *err);
int bench_work(struct disk_args *a, struct error *err);
int convert_prepare(struct disk_args *a, struct error *err);
int convert_work(struct disk_args *a, struct error *err);
/* Snapshots as a table, or into list "snapshots" of f; nothing where there are none. */
void snapshot_table(const struct image_snapshot *list, unsigned n);
void snapshot_facts(struct facts *f, const struct image_snapshot *list, unsigned n);
#endif
