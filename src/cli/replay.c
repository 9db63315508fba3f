/*
 * vmm disk replay: from a log of writes the images that a power cut could have left.
 *
 * How this works. One pass over the log checks all of it and counts flushes. A second one keeps a working image, an
 * unlinked file beside the output, at the state of the entry reached. Each image is a clone of it:
 *
 *      --at N            after N entries
 *      --every-flush     when a flush is reached
 *      --torn            when a flush (or the start) is reached, the writes after it are looked at, up to the next one:
 *
 *           flush   w1  w2  w3! w4 | w5  ...  flush        "!": FUA        "|": the power goes here, at random
 *           intact  some of them,  ^ certain  ^ on its way: a part of it
 *                   in any order, any of their sectors
 *
 * A FUA write that completed is on the medium, and nothing older may come over it, so what is before it is dealt with
 * before it. Image K of a seed is the same in every run: it has random numbers of its own.
 *
 * Memory is bounded: at most PIECE_MAX entries are shuffled at once; of a longer stretch without a flush each such
 * piece is shuffled by itself.
 */
#include "replay.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "block/writelog.h"
#include "splitmix.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/image.h"
#include "vmm/log.h"
#include "vmm/opts.h"

#define PIECE_MAX  (1u << 20)
#define COUNT_MAX  1000000u
#define FAILED_MAX 1000u        /* named in the JSON */
#define SAID_MAX   (64u << 10)  /* of a command that failed */

enum mode { MODE_NONE, MODE_LIST, MODE_AT, MODE_FLUSH, MODE_FUA, MODE_TORN };

struct options {
	const char *log, *base, *out, *exec;
	enum mode mode;
	bool json, keep_failed, has_count, has_size, help;
	uint64_t at, seed, count, size;
};

struct replay {
	struct options o;
	struct replay_log log;
	uint64_t size;                  /* of the disk */
	uint64_t flushes;
	int work;                       /* the working image */
	int said;                       /* what a command says; a memfd */
	uint64_t images, failures;
	struct facts *facts;            /* --json */
	struct replay_entry *piece;     /* --torn */
};

extern char **environ;

/* ---- options ---- */

static const char usage[] =
	"usage: vmm disk replay --log FILE --list\n"
	"       vmm disk replay --log FILE [--base FILE] --out PATH --at N | --every-flush | --every-fua | --torn\n"
	"From a log of a disk's writes (--disk ...,log=FILE, or dm-log-writes) the images a power cut could have left.\n"
	"\n"
	"  --log FILE       the log\n"
	"  --base FILE      the disk as it was before, a raw image; without it all zeroes\n"
	"  --size SIZE      of the disk; default the size of the base, or as far as the log writes\n"
	"  --out PATH       the image to be made (--at), or the directory for them\n"
	"  --at N           the disk after N entries\n"
	"  --every-flush    the disk at each flush\n"
	"  --every-fua      the same, and at each write that went straight to the medium\n"
	"  --torn           after each flush, a random part of what was written since, in any order, sectors torn apart\n"
	"  --seed S         of --torn; default 0\n"
	"  --count N        of --torn: this many images, at random flushes; default one at each\n"
	"  --exec COMMAND   run it for each image with {} for its name, then remove the image; say which failed\n"
	"  --keep-failed    do not remove those\n"
	"  --list           print the entries\n"
	"  --json           print results as JSON\n"
	"\n"
	"Status 0; 1: it could not be done; 2: the command failed for an image.\n";

static int set_mode(struct options *o, enum mode mode, struct error *err)
{
	if (o->mode && o->mode != mode)
		return error_set(err, EINVAL, "one of --list, --at, --every-flush, --every-fua and --torn at a time");
	o->mode = mode;
	return 0;
}

static int take_flag(struct options *o, const char *name, bool *taken, struct error *err)
{
	static const struct {
		const char *name;
		enum mode mode;
	} modes[] = { { "list", MODE_LIST }, { "every-flush", MODE_FLUSH }, { "every-fua", MODE_FUA }, { "torn", MODE_TORN } };

	*taken = true;
	for (unsigned i = 0; i < ARRAY_LEN(modes); i++)
		if (!strcmp(name, modes[i].name))
			return set_mode(o, modes[i].mode, err);
	if (!strcmp(name, "json"))
		o->json = true;
	else if (!strcmp(name, "keep-failed"))
		o->keep_failed = true;
	else if (!strcmp(name, "help"))
		o->help = true;
	else
		*taken = false;
	return 0;
}

static int take_number(const char *name, const char *val, int (*parse)(const char *, uint64_t *), uint64_t *to,
	struct error *err)
{
	return parse(val, to) ? error_set(err, EINVAL, "--%s: '%s' is not a number", name, val) : 0;
}

static int take_value(struct options *o, const char *name, const char *val, struct error *err)
{
	int r;

	if (!strcmp(name, "log")) {
		o->log = val;
	} else if (!strcmp(name, "base")) {
		o->base = val;
	} else if (!strcmp(name, "out")) {
		o->out = val;
	} else if (!strcmp(name, "exec")) {
		o->exec = val;
	} else if (!strcmp(name, "seed")) {
		return take_number(name, val, parse_u64, &o->seed, err);
	} else if (!strcmp(name, "count")) {
		o->has_count = true;
		return take_number(name, val, parse_u64, &o->count, err);
	} else if (!strcmp(name, "size")) {
		o->has_size = true;
		return take_number(name, val, parse_size, &o->size, err);
	} else if (!strcmp(name, "at")) {
		r = set_mode(o, MODE_AT, err);
		return r ? r : take_number(name, val, parse_u64, &o->at, err);
	}
	return 0;
}

static bool is_value(const char *name)
{
	static const char *const names[] = { "log", "base", "out", "exec", "seed", "count", "size", "at" };

	for (unsigned i = 0; i < ARRAY_LEN(names); i++)
		if (!strcmp(name, names[i]))
			return true;
	return false;
}

static int take(struct options *o, int argc, char **argv, int *i, struct error *err)
{
	const char *arg = argv[*i], *eq = strchr(arg, '=');
	char name[32];
	bool taken;
	int r;

	if (!strcmp(arg, "-h"))
		arg = "--help";
	if (strncmp(arg, "--", 2))
		return error_set(err, EINVAL, "unexpected argument '%s' (vmm disk replay --help)", arg);
	snprintf(name, sizeof(name), "%.*s", eq ? (int)MIN(eq - arg - 2, 31) : 31, arg + 2);
	r = take_flag(o, eq ? "" : name, &taken, err);
	if (r || taken)
		return r;
	if (!is_value(name))
		return error_set(err, EINVAL, "unknown option '%s' (vmm disk replay --help)", arg);
	if (!eq && ++*i == argc)
		return error_set(err, EINVAL, "--%s: a value is missing", name);
	return take_value(o, name, eq ? eq + 1 : argv[*i], err);
}

static int check_options(const struct options *o, struct error *err)
{
	if (!o->log)
		return error_set(err, EINVAL, "no log named: --log FILE");
	if (!o->mode)
		return error_set(err, EINVAL, "which images: --at N, --every-flush, --every-fua or --torn; or --list");
	if (o->mode != MODE_LIST && !o->out)
		return error_set(err, EINVAL, "where to: --out %s", o->mode == MODE_AT ? "FILE" : "DIRECTORY");
	if (o->exec && !strstr(o->exec, "{}"))
		return error_set(err, EINVAL, "--exec: the command has no {} for the name of the image");
	if (o->keep_failed && !o->exec)
		return error_set(err, EINVAL, "--keep-failed: of --exec only");
	if (o->has_count && (o->mode != MODE_TORN || !o->count || o->count > COUNT_MAX))
		return error_set(err, EINVAL, "--count: 1 to %u, of --torn only", COUNT_MAX);
	if (o->has_size && (!o->size || o->size % 512 || o->size > IMAGE_SIZE_MAX))
		return error_set(err, EINVAL, "--size: must be a multiple of 512, at most 64T");
	return 0;
}

/* ---- the log as a list ---- */

static const char *kind_of(const struct replay_entry *e)
{
	return e->flags & WRITELOG_MARK ? "mark" : e->flags & WRITELOG_DISCARD ? "discard" : e->len ? "write" : "flush";
}

static void print_entry(uint64_t index, const struct replay_entry *e, const char *mark)
{
	printf("%8llu  %-7s", (unsigned long long)index, kind_of(e));
	if (e->len)
		printf("  %12llu +%llu", (unsigned long long)(e->off / 512), (unsigned long long)(e->len / 512));
	if (e->flags & WRITELOG_FLUSH && e->len)
		printf("  flush");
	if (e->flags & WRITELOG_FUA)
		printf("  fua");
	if (e->flags & WRITELOG_METADATA)
		printf("  metadata");
	if (e->flags & WRITELOG_MARK)
		printf("  ");
	for (uint32_t i = 0; i < e->mark_len && mark[i]; i++)
		putchar(mark[i] >= ' ' && mark[i] < 127 ? mark[i] : '?');
	putchar('\n');
}

static int print_json(uint64_t index, const struct replay_entry *e, char *mark)
{
	struct facts *f = facts_new();
	auto_free char *text = NULL;

	facts_u64(f, "entry", index);
	facts_str(f, "kind", kind_of(e));
	facts_u64(f, "sector", e->off / 512);
	facts_u64(f, "sectors", e->len / 512);
	facts_bool(f, "flush", e->flags & WRITELOG_FLUSH);
	facts_bool(f, "fua", e->flags & WRITELOG_FUA);
	facts_bool(f, "metadata", e->flags & WRITELOG_METADATA);
	if (e->flags & WRITELOG_MARK) {
		mark[e->mark_len] = '\0';
		facts_str(f, "mark", mark);
	}
	text = facts_text(f);
	facts_free(f);
	if (!text)
		return -ENOMEM;
	puts(text);
	return 0;
}

static int list(const struct replay *p, struct error *err)
{
	char mark[WRITELOG_MARK_MAX + 1];
	struct replay_cursor c = LOG_START;
	struct replay_entry e;
	int r;

	while ((r = log_next(&p->log, &c, UINT64_MAX, &e, mark, err)) > 0) {
		if (!p->o.json)
			print_entry(c.index, &e, mark);
		else if (print_json(c.index, &e, mark))
			return error_set(err, ENOMEM, "out of memory");
	}
	return r;
}

/* ---- one image ---- */

/* What the shell takes as one word. */
static void quote(FILE *f, const char *text)
{
	fputc('\'', f);
	for (; *text; text++)
		*text == '\'' ? fputs("'\\''", f) : fputc(*text, f);
	fputc('\'', f);
}

static char *command(const char *exec, const char *path)
{
	char *text = NULL;
	size_t size;
	FILE *f = open_memstream(&text, &size);

	if (!f)
		return NULL;
	for (const char *at; (at = strstr(exec, "{}")); exec = at + 2) {
		fwrite(exec, 1, (size_t)(at - exec), f);
		quote(f, path);
	}
	fputs(exec, f);
	return fclose(f) ? NULL : text;
}

/* Its wait status, or -errno. What it says is kept in p->said. */
static int run_command(struct replay *p, const char *path)
{
	auto_free char *text = command(p->o.exec, path);
	char *argv[] = { "sh", "-c", text, NULL };
	posix_spawn_file_actions_t files;
	posix_spawnattr_t attr;
	sigset_t set;
	int r, status;
	pid_t pid;

	if (!text)
		return -ENOMEM;
	if (ftruncate(p->said, 0) || lseek(p->said, 0, SEEK_SET))
		return -errno;
	posix_spawn_file_actions_init(&files);
	posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
	posix_spawn_file_actions_adddup2(&files, p->said, 1);
	posix_spawn_file_actions_adddup2(&files, p->said, 2);
	posix_spawnattr_init(&attr);
	sigemptyset(&set);
	sigaddset(&set, SIGPIPE);       /* which vmm ignores */
	sigaddset(&set, SIGXFSZ);
	posix_spawnattr_setsigdefault(&attr, &set);
	posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSIGDEF);
	r = -posix_spawn(&pid, "/bin/sh", &files, &attr, argv, environ);
	posix_spawnattr_destroy(&attr);
	posix_spawn_file_actions_destroy(&files);
	if (r)
		return r;
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return -errno;
	return status;
}

static void repeat_said(const struct replay *p)
{
	static char text[SAID_MAX];
	off_t end = lseek(p->said, 0, SEEK_END);
	ssize_t n = pread(p->said, text, sizeof(text), end > (off_t)sizeof(text) ? end - (off_t)sizeof(text) : 0);

	if (n > 0)
		fwrite(text, 1, (size_t)n, stderr);
}

static void note_failure(struct replay *p, const char *path, uint64_t entry, int status)
{
	struct facts *f;
	char how[40];

	snprintf(how, sizeof(how), WIFEXITED(status) ? "status %d" : "signal %d",
		WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status));
	fflush(stdout);
	repeat_said(p);
	log_error("'%s' (after entry %llu): the command ended with %s", path, (unsigned long long)entry, how);
	if (p->failures++ >= FAILED_MAX || !p->facts)
		return;
	f = facts_item(p->facts, "failed");
	facts_str(f, "image", path);
	facts_u64(f, "entry", entry);
	facts_str(f, "how", how);
}

/* The image is complete: what is to be done with it. */
static int deliver(struct replay *p, const char *path, uint64_t entry, struct error *err)
{
	int status;

	p->images++;
	if (!p->o.exec) {
		if (!p->o.json)
			puts(path);
		return 0;
	}
	status = run_command(p, path);
	if (status < 0)
		return error_errno(err, -status, "--exec");
	if (status)
		note_failure(p, path, entry, status);
	if ((!status || !p->o.keep_failed) && unlink(path))
		return error_errno(err, errno, "cannot remove '%s'", path);
	return 0;
}

static int new_file(const char *path, struct error *err)
{
	int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOCTTY, 0644);

	return fd < 0 ? error_errno(err, errno, "cannot make '%s'", path) : fd;
}

/* A clone of the working image, changed by change() and given out. index: in its name; entry: for people. */
static int make_image(struct replay *p, uint64_t index, uint64_t entry,
	int (*change)(struct replay *p, int fd, uint64_t index, void *arg, struct error *err), void *arg, struct error *err)
{
	const char *slash = strrchr(p->o.log, '/'), *name = slash ? slash + 1 : p->o.log;
	auto_free char *path = NULL;
	auto_close int fd = -1;
	int r;

	if (p->o.mode == MODE_AT ? !(path = strdup(p->o.out)) :
		asprintf(&path, "%s/%s.%06llu.img", p->o.out, name, (unsigned long long)index) < 0)
		return error_set(err, ENOMEM, "out of memory");
	fd = new_file(path, err);
	if (fd < 0)
		return fd;
	r = raw_clone(p->work, fd, p->size, err);
	if (!r && change)
		r = change(p, fd, index, arg, err);
	close(TAKE_FD(fd));
	if (r) {
		error_prefix(err, "'%s': ", path);
		unlink(path);
		return r;
	}
	return deliver(p, path, entry, err);
}

/* ---- at a flush ---- */

static int apply_all(const struct replay *p, const struct replay_entry *e, struct error *err)
{
	return raw_apply(p->work, &p->log, e, 0, e->len, err);
}

static int replay_up_to(struct replay *p, struct error *err)
{
	struct replay_cursor c = LOG_START;
	struct replay_entry e;
	int r = 1;

	if (p->o.at > p->log.entries)
		return error_set(err, EINVAL, "--at %llu: the log has %llu entries", (unsigned long long)p->o.at,
			(unsigned long long)p->log.entries);
	while (c.index < p->o.at && (r = log_next(&p->log, &c, p->size, &e, NULL, err)) > 0) {
		r = apply_all(p, &e, err);
		if (r)
			break;
	}
	return r < 0 ? r : make_image(p, p->o.at, p->o.at, NULL, NULL, err);
}

static int replay_flushes(struct replay *p, struct error *err)
{
	const uint32_t points = p->o.mode == MODE_FUA ? WRITELOG_FLUSH | WRITELOG_FUA : WRITELOG_FLUSH;
	struct replay_cursor c = LOG_START;
	struct replay_entry e;
	int r;

	while ((r = log_next(&p->log, &c, p->size, &e, NULL, err)) > 0) {
		r = apply_all(p, &e, err);
		if (!r && e.flags & points)
			r = make_image(p, c.index, c.index, NULL, NULL, err);
		if (r)
			return r;
	}
	return r;
}

/* ---- torn ---- */

/* The stretch between two flushes that a torn image is about. */
struct stretch {
	struct replay_cursor from;
	uint64_t length;                /* entries */
};

static bool likely(uint64_t *random, uint32_t of_1024)
{
	return splitmix(random) % 1024 < of_1024;
}

/* Some of its sectors: the first few, or any. */
static int apply_part(struct replay *p, int fd, const struct replay_entry *e, uint64_t *random, struct error *err)
{
	uint64_t sectors = e->len / 512, bits = 0;
	int r = 0;

	if (!sectors)
		return 0;
	if (likely(random, 512))
		return raw_apply(fd, &p->log, e, 0, splitmix(random) % (sectors + 1) * 512, err);
	for (uint64_t i = 0; i < sectors && !r; i++) {
		if (i % 64 == 0)
			bits = splitmix(random);
		if (bits >> i % 64 & 1)
			r = raw_apply(fd, &p->log, e, i * 512, 512, err);
	}
	return r;
}

/* n entries that no flush and no FUA write keeps in order. chance: of each to be there, of 1024. */
static int apply_some(struct replay *p, int fd, unsigned n, uint64_t *random, uint32_t chance, struct error *err)
{
	int r = 0;

	for (unsigned i = n; i > 1; i--) {      /* Fisher, Yates */
		unsigned j = (unsigned)(splitmix(random) % i);
		struct replay_entry t = p->piece[i - 1];

		p->piece[i - 1] = p->piece[j];
		p->piece[j] = t;
	}
	for (unsigned i = 0; i < n && !r; i++) {
		if (!likely(random, chance))
			continue;
		if (likely(random, 256))
			r = apply_part(p, fd, &p->piece[i], random, err);
		else
			r = raw_apply(fd, &p->log, &p->piece[i], 0, p->piece[i].len, err);
	}
	return r;
}

static int tear(struct replay *p, int fd, uint64_t index, void *arg, struct error *err)
{
	const struct stretch *s = arg;
	struct replay_cursor c = s->from;
	uint64_t random = p->o.seed ^ index * 0x2545f4914f6cdd1dull;
	uint64_t cut = splitmix(&random) % (s->length + 1);
	uint32_t chance = (uint32_t)(splitmix(&random) % 1025);
	struct replay_entry e;
	unsigned n = 0;
	int r = 0;

	for (uint64_t i = 0; i < cut && !r; i++) {
		r = log_next(&p->log, &c, p->size, &e, NULL, err);
		if (r <= 0)
			return r;
		r = 0;
		if (!(e.flags & WRITELOG_FUA) && e.len)
			p->piece[n++] = e;
		if (e.flags & WRITELOG_FUA || n == PIECE_MAX) {
			r = apply_some(p, fd, n, &random, chance, err);
			n = 0;
		}
		if (!r && e.flags & WRITELOG_FUA)
			r = raw_apply(fd, &p->log, &e, 0, e.len, err);
	}
	if (!r)
		r = apply_some(p, fd, n, &random, chance, err);
	if (r || cut == s->length)
		return r;
	r = log_next(&p->log, &c, p->size, &e, NULL, err);
	return r <= 0 ? r : apply_part(p, fd, &e, &random, err);
}

/* From c to the next flush, or the end; c ends behind it. */
static int measure(const struct replay *p, struct replay_cursor *c, struct stretch *s, struct error *err)
{
	struct replay_entry e = { 0 };
	int r;

	*s = (struct stretch){ .from = *c };
	while ((r = log_next(&p->log, c, p->size, &e, NULL, err)) > 0) {
		if (e.flags & WRITELOG_FLUSH)
			return 0;
		s->length++;
	}
	return r;
}

/* Bring the working image to where c is. */
static int catch_up(struct replay *p, struct replay_cursor *at, const struct replay_cursor *c, struct error *err)
{
	struct replay_entry e;
	int r;

	while (at->index < c->index) {
		r = log_next(&p->log, at, p->size, &e, NULL, err);
		if (r <= 0)
			return r;
		r = apply_all(p, &e, err);
		if (r)
			return r;
	}
	return 0;
}

/* How many images each stretch gets: NULL and *r 0 means one each. */
static uint32_t *spread(const struct replay *p, uint64_t stretches, int *r, struct error *err)
{
	uint64_t random = p->o.seed;
	uint32_t *n;

	*r = 0;
	if (!p->o.has_count)
		return NULL;
	n = calloc(stretches, sizeof(*n));
	if (!n) {
		*r = error_set(err, ENOMEM, "out of memory");
		return NULL;
	}
	for (uint64_t i = 0; i < p->o.count; i++)
		n[splitmix(&random) % stretches]++;
	return n;
}

static int replay_torn(struct replay *p, struct error *err)
{
	struct replay_cursor c = LOG_START, at = LOG_START;
	uint64_t stretches = p->flushes + 1, index = 0;
	int r;
	auto_free uint32_t *many = spread(p, stretches, &r, err);

	if (r)
		return r;
	p->piece = calloc(MIN(p->log.entries + 1, PIECE_MAX), sizeof(p->piece[0]));
	if (!p->piece)
		return error_set(err, ENOMEM, "out of memory");
	for (uint64_t i = 0; i < stretches; i++) {
		struct stretch s;

		r = catch_up(p, &at, &c, err);
		if (!r)
			r = measure(p, &c, &s, err);
		for (uint32_t n = many ? many[i] : 1; n && !r; n--) {
			index++;
			r = make_image(p, index, s.from.index, tear, &s, err);
		}
		if (r)
			return r;
	}
	return 0;
}

/* ---- all of it ---- */

/* The whole log makes sense, and how large the disk is. */
static int look_over(struct replay *p, uint64_t base_size, struct error *err)
{
	uint64_t limit = p->o.has_size ? p->o.size : p->o.base ? base_size : UINT64_MAX, end = 0;
	struct replay_cursor c = LOG_START;
	struct replay_entry e;
	int r;

	while ((r = log_next(&p->log, &c, limit, &e, NULL, err)) > 0) {
		p->flushes += (e.flags & WRITELOG_FLUSH) != 0;
		end = MAX(end, e.off + e.len);
	}
	if (r)
		return r;
	p->size = limit == UINT64_MAX ? end : limit;
	if (!p->size)
		return error_set(err, EINVAL, "the log writes nothing: how large is the disk? --size SIZE");
	return 0;
}

static int open_base(const struct replay *p, uint64_t *size, struct error *err)
{
	auto_close int fd = -1;
	struct stat st;

	if (!p->o.base)
		return -1;
	fd = open(p->o.base, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	if (fd < 0)
		return error_errno(err, errno, "cannot open '%s'", p->o.base);
	if (fstat(fd, &st) || (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)))
		return error_set(err, EINVAL, "'%s' is neither a regular file nor a block device", p->o.base);
	if (raw_size(fd, size, err))
		return -err->code;
	return TAKE_FD(fd);
}

/* Where the images go, so that they can share its blocks. */
static int open_work(struct replay *p, struct error *err)
{
	auto_free char *path = NULL;
	const char *slash = strrchr(p->o.out, '/');
	struct stat st;

	if (p->o.mode != MODE_AT && (stat(p->o.out, &st) || !S_ISDIR(st.st_mode)))
		return error_set(err, ENOTDIR, "--out: '%s' is not a directory", p->o.out);
	if (p->o.mode != MODE_AT ? asprintf(&path, "%s/.vmm-replay-XXXXXX", p->o.out) < 0 :
		asprintf(&path, "%.*s.vmm-replay-XXXXXX", slash ? (int)(slash - p->o.out) + 1 : 0, p->o.out) < 0)
		return error_set(err, ENOMEM, "out of memory");
	p->work = mkostemp(path, O_CLOEXEC);
	if (p->work < 0)
		return error_errno(err, errno, "cannot make a file beside '%s'", p->o.out);
	unlink(path);
	return 0;
}

static int make_images(struct replay *p, struct error *err)
{
	uint64_t base_size = 0;
	auto_close int base = open_base(p, &base_size, err);
	int r;

	if (p->o.base && base < 0)
		return base;
	if ((r = look_over(p, base_size, err)) || (r = open_work(p, err)) ||
		(r = raw_clone(base, p->work, p->size, err)))
		return r;
	p->said = memfd_create("said", MFD_CLOEXEC);
	if (p->said < 0)
		return error_errno(err, errno, "memfd_create");
	switch (p->o.mode) {
	case MODE_AT:
		return replay_up_to(p, err);
	case MODE_FLUSH:
	case MODE_FUA:
		return replay_flushes(p, err);
	case MODE_TORN:
		return replay_torn(p, err);
	case MODE_NONE:
	case MODE_LIST:
		break;
	}
	return 0;
}

static void report(struct replay *p)
{
	auto_free char *text = NULL;

	if (!p->facts) {
		if (p->o.exec)
			printf("%llu images, %llu failed\n", (unsigned long long)p->images, (unsigned long long)p->failures);
		return;
	}
	facts_u64(p->facts, "entries", p->log.entries);
	facts_u64(p->facts, "flushes", p->flushes);
	facts_u64(p->facts, "size", p->size);
	facts_u64(p->facts, "images", p->images);
	facts_u64(p->facts, "failures", p->failures);
	text = facts_text(p->facts);
	if (text)
		puts(text);
}

static int replay(struct replay *p, struct error *err)
{
	int r = log_open(&p->log, p->o.log, err);

	if (r)
		return r;
	if (p->o.mode == MODE_LIST) {
		r = list(p, err);
	} else {
		p->facts = p->o.json ? facts_new() : NULL;
		r = make_images(p, err);
		if (!r)
			report(p);
		if (p->facts)
			facts_free(p->facts);
	}
	free(p->piece);
	if (p->work >= 0)
		close(p->work);
	if (p->said >= 0)
		close(p->said);
	log_close(&p->log);
	if (fflush(stdout) && !r)
		r = error_errno(err, errno, "cannot write the result");
	return r;
}

int disk_replay(int argc, char **argv)
{
	struct replay p = { .work = -1, .said = -1 };
	struct error err = { 0 };
	int r = 0;

	for (int i = 0; i < argc && !r; i++)
		r = take(&p.o, argc, argv, &i, &err);
	if (!r && p.o.help) {
		fputs(usage, stdout);
		return 0;
	}
	if (!r)
		r = check_options(&p.o, &err);
	if (!r)
		r = replay(&p, &err);
	if (r) {
		log_error("disk replay: %s", err.msg);
		return 1;
	}
	return p.failures ? 2 : 0;
}
