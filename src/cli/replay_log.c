/* A write log (src/block/writelog.h) from anywhere: each number is checked against the file and the disk. */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "block/writelog.h"
#include "replay.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/image.h"

static int read_super(struct replay_log *l, struct error *err)
{
	struct writelog_super s;

	if (pread(l->fd, &s, sizeof(s), 0) != (ssize_t)sizeof(s) || le64toh(s.magic) != WRITELOG_MAGIC)
		return error_set(err, EINVAL, "'%s' is not a write log (dm-log-writes)", l->path);
	if (le64toh(s.version) != WRITELOG_VERSION)
		return error_set(err, EINVAL, "'%s' is a write log of version %llu: 1 is supported", l->path,
			(unsigned long long)le64toh(s.version));
	l->entries = le64toh(s.nr_entries);
	l->block = le32toh(s.sectorsize);
	if (l->block < 512 || l->block > WRITELOG_MARK_MAX || l->block & (l->block - 1))
		return error_set(err, EINVAL, "'%s': sectors of %u bytes: 512 to 4096 are supported", l->path, l->block);
	if (l->entries > l->bytes / l->block)
		return error_set(err, EINVAL, "'%s' claims %llu entries and has room for %llu", l->path,
			(unsigned long long)l->entries, (unsigned long long)(l->bytes / l->block));
	return 0;
}

int log_open(struct replay_log *l, const char *path, struct error *err)
{
	struct stat st;
	int r;

	*l = (struct replay_log){ .fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK), .path = path };
	if (l->fd < 0)
		return error_errno(err, errno, "cannot open '%s'", path);
	if (fstat(l->fd, &st)) {
		r = error_errno(err, errno, "cannot look at '%s'", path);
	} else if (S_ISREG(st.st_mode)) {
		l->bytes = (uint64_t)st.st_size;
		r = read_super(l, err);
	} else if (S_ISBLK(st.st_mode)) {
		r = raw_size(l->fd, &l->bytes, err);
		if (!r)
			r = read_super(l, err);
	} else {
		r = error_set(err, EINVAL, "'%s' is neither a regular file nor a block device", path);
	}
	if (r)
		log_close(l);
	return r;
}

void log_close(struct replay_log *l)
{
	close(l->fd);
	l->fd = -1;
}

static int bad(const struct replay_log *l, const struct replay_cursor *c, const char *what, struct error *err)
{
	return error_set(err, EINVAL, "'%s': entry %llu %s", l->path, (unsigned long long)c->index + 1, what);
}

/* l: 0 or an error. Sizes are in blocks as the log has them. */
static int check(const struct replay_log *l, const struct replay_cursor *c, const struct writelog_entry *raw,
	uint64_t size, struct replay_entry *e, struct error *err)
{
	uint64_t nr = le64toh(raw->nr_sectors), sector = le64toh(raw->sector), flags = le64toh(raw->flags);
	uint64_t text = le64toh(raw->data_len), data = c->at + l->block, end;

	if (flags & ~(uint64_t)WRITELOG_FLAGS)
		return bad(l, c, "has flags that no log has", err);
	if (!nr && !(flags & (WRITELOG_FLUSH | WRITELOG_FUA | WRITELOG_DISCARD | WRITELOG_MARK)))
		return bad(l, c, "says nothing", err);
	if (flags & WRITELOG_MARK ? nr || text > l->block - sizeof(*raw) : text)
		return bad(l, c, "has a text where none fits", err);
	*e = (struct replay_entry){ .flags = (uint32_t)flags, .mark_len = (uint32_t)text };
	if (!nr)
		return 0;
	if (__builtin_mul_overflow(nr, l->block, &e->len) || __builtin_mul_overflow(sector, l->block, &e->off) ||
		__builtin_add_overflow(e->off, e->len, &end) || end > MIN(size, IMAGE_SIZE_MAX))
		return bad(l, c, "is past the end of the disk", err);
	if (flags & WRITELOG_DISCARD)
		return 0;
	e->data = data;
	return e->len > l->bytes || data > l->bytes - e->len ? bad(l, c, "is cut off", err) : 0;
}

int log_next(const struct replay_log *l, struct replay_cursor *c, uint64_t size, struct replay_entry *e, void *mark,
	struct error *err)
{
	struct writelog_entry raw;
	int r;

	if (c->index == l->entries)
		return 0;
	if (!c->index)
		c->at = l->block;
	if (l->bytes < l->block || c->at > l->bytes - l->block ||
		pread(l->fd, &raw, sizeof(raw), (off_t)c->at) != (ssize_t)sizeof(raw))
		return bad(l, c, "is not there", err);
	r = check(l, c, &raw, size, e, err);
	if (r)
		return r;
	if (mark && e->mark_len && pread(l->fd, mark, e->mark_len, (off_t)(c->at + sizeof(raw))) != (ssize_t)e->mark_len)
		return bad(l, c, "cannot be read", err);
	c->index++;
	c->at += l->block + (e->data ? e->len : 0);
	return 1;
}
