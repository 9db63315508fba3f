/*
 * Image locks that QEMU's tools respect and whose locks we respect.
 *
 * How this works. QEMU puts open-file-description locks on single bytes of the image, all of them *read*
 * locks, so that any number of holders can coexist: byte 100+n says "I use permission n", byte 200+n
 * says "I do not let others use permission n". After taking its own, an opener asks whether anybody else
 * holds the byte that contradicts: whoever uses what I do not share, or does not share what I use.
 * Both of two racing openers may be refused; never are both let in.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/log.h"
#include "format.h"

#define USED_BASE   100
#define DENIED_BASE 200

enum perm { PERM_READ, PERM_WRITE, PERM_WRITE_UNCHANGED, PERM_RESIZE, NR_PERMS };

/* What a guest's disk holds: a writer shares reading only, a reader shares reading only. */
#define BIT(p) (1u << (p))
static const unsigned denied = BIT(PERM_WRITE) | BIT(PERM_RESIZE);

static int byte_lock(int fd, off_t at)
{
	struct flock l = { .l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = at, .l_len = 1 };

	return fcntl(fd, F_OFD_SETLK, &l) ? -errno : 0;
}

/* 1: somebody else holds a lock there, 0: nobody, or -errno. */
static int byte_held(int fd, off_t at)
{
	struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = at, .l_len = 1 };

	if (fcntl(fd, F_OFD_GETLK, &l))
		return -errno;
	return l.l_type != F_UNLCK;
}

static int in_use(const char *path, const char *how, bool readonly, struct error *err)
{
	return error_set(err, EBUSY, "'%s' is in use: another program %s%s", path, how,
		readonly ? "" : " (two users are fine only if both open it with ro)");
}

static int take(int fd, unsigned used)
{
	int r;

	for (unsigned p = 0; p < NR_PERMS; p++) {
		if (used & BIT(p) && (r = byte_lock(fd, USED_BASE + p)))
			return r;
		if (denied & BIT(p) && (r = byte_lock(fd, DENIED_BASE + p)))
			return r;
	}
	return 0;
}

static int look_for_conflict(int fd, const char *path, unsigned used, bool readonly, struct error *err)
{
	int r;

	for (unsigned p = 0; p < NR_PERMS; p++) {
		if (denied & BIT(p)) {
			r = byte_held(fd, USED_BASE + p);
			if (r > 0)
				return in_use(path, "has it open for writing", readonly, err);
			if (r < 0)
				return r;
		}
		if (used & BIT(p)) {
			r = byte_held(fd, DENIED_BASE + p);
			if (r > 0)
				return in_use(path, "has it open and does not share it", readonly, err);
			if (r < 0)
				return r;
		}
	}
	return 0;
}

int lock_image(int fd, const char *path, bool readonly, struct error *err)
{
	unsigned used = readonly ? BIT(PERM_READ)
				 : BIT(PERM_READ) | BIT(PERM_WRITE) | BIT(PERM_RESIZE);
	int r = take(fd, used);

	if (r == -EAGAIN || r == -EACCES)       /* a write lock: not QEMU, but somebody */
		return in_use(path, "has locked it", readonly, err);
	if (!r)
		r = look_for_conflict(fd, path, used, readonly, err);
	if (r == -EBUSY)
		return r;
	if (r)          /* some network file systems know no locks: say so and go on */
		log_warn("'%s': the file system keeps no locks (%s): nothing stops a second user",
			path, strerrordesc_np(-r));
	return 0;
}
