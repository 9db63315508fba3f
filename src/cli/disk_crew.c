#include "disk_crew.h"
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "vmm/cleanup.h"

#define STACK      (256u << 10)
#define UNIT_LEAST 512u
#define ROOM_SMALL (256u << 10)

struct crew {
	struct crew_how how;
	pthread_mutex_t lock;
	pthread_cond_t work, done;
	pthread_t *thread;
	unsigned nr_threads, nr_jobs;
	struct crew_job *job;
	uint64_t next;                  /* number of the next job */
	bool over;
	struct image_scratch scratch;   /* the main thread's */
};

/* ---- a job ---- */

static bool is_zero(const uint8_t *p, size_t n)
{
	size_t head = MIN(n, 16);

	for (size_t k = 0; k < head; k++)
		if (p[k])
			return false;
	return n <= 16 || !memcmp(p, p + 16, n - 16);
}

static int write_all(int fd, const uint8_t *buf, size_t len, uint64_t off)
{
	while (len) {
		ssize_t n = pwrite(fd, buf, len, (off_t)off);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		buf += n;
		off += (uint64_t)n;
		len -= (size_t)n;
	}
	return 0;
}

static int fetch(struct crew_job *j, struct image_scratch *s)
{
	uint64_t at = 0;
	int r = 0;

	for (unsigned k = 0; !r && !j->filled && k < j->nr; k++) {
		r = image_fetch(&j->piece[k], s, j->buf + at, j->piece[k].len);
		at += j->piece[k].len;
	}
	return r;
}

/* Runs of units that are not zero. */
static int write_raw(const struct crew_how *h, const struct crew_job *j)
{
	uint64_t at = 0;
	int r = 0;

	while (!r && at < j->len) {
		uint64_t end = at;

		while (end < j->len && !(h->unit && j->zero[end / h->unit]))
			end = h->unit ? MIN(end + h->unit, j->len) : j->len;
		if (end > at)
			r = write_all(h->raw_fd, j->buf + at, end - at, j->off + at);
		at = end < j->len ? end + h->unit : end;
	}
	return r;
}

bool crew_zero(const struct crew_how *how, const struct crew_job *j, uint64_t at, uint64_t end)
{
	while (how->unit && at < end && j->zero[at / how->unit])
		at = (at / how->unit + 1) * how->unit;
	return at >= end;
}

static void pack(const struct crew_how *h, struct crew_job *j)
{
	uint32_t cluster = image_cluster(h->packs);
	uint64_t end = (j->len + cluster - 1) / cluster * cluster;

	memset(j->buf + j->len, 0, end - j->len);
	for (uint64_t at = 0; at < end; at += cluster)
		j->z_len[at / cluster] = crew_zero(h, j, at, MIN(at + cluster, j->len)) ? 0
			: image_compress(h->packs, j->buf + at, j->z + at);
}

static int do_job(const struct crew_how *h, struct crew_job *j, struct image_scratch *s)
{
	int r = fetch(j, s);

	for (uint64_t at = 0; !r && h->unit && at < j->len; at += h->unit)
		j->zero[at / h->unit] = is_zero(j->buf + at, MIN(h->unit, j->len - at));
	if (!r && h->packs)
		pack(h, j);
	return !r && h->raw_fd >= 0 ? write_raw(h, j) : r;
}

/* ---- the threads ---- */

/* The job in this state that was submitted first. */
static struct crew_job *oldest(struct crew *c, enum crew_state state)
{
	struct crew_job *best = NULL;

	for (unsigned k = 0; k < c->nr_jobs; k++)
		if (c->job[k].state == state && (!best || c->job[k].number < best->number))
			best = &c->job[k];
	return best;
}

/* Under the lock, which is not held meanwhile. */
static void take(struct crew *c, struct crew_job *j, struct image_scratch *s)
{
	j->state = CREW_RUNNING;
	pthread_mutex_unlock(&c->lock);
	j->r = do_job(&c->how, j, s);
	pthread_mutex_lock(&c->lock);
	j->state = CREW_DONE;
}

static void *thread_main(void *arg)
{
	struct image_scratch scratch = { 0 };
	struct crew *c = arg;
	struct crew_job *j;

	pthread_mutex_lock(&c->lock);
	for (;;) {
		while (!(j = oldest(c, CREW_QUEUED)) && !c->over)
			pthread_cond_wait(&c->work, &c->lock);
		if (c->over)
			break;
		take(c, j, &scratch);
		pthread_cond_signal(&c->done);
	}
	pthread_mutex_unlock(&c->lock);
	image_scratch_free(&scratch);
	return NULL;
}

static int start_threads(struct crew *c)
{
	pthread_attr_t attr;
	int r = 0;

	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, STACK);
	while (!r && c->nr_threads + 1 < c->how.threads) {
		r = pthread_create(&c->thread[c->nr_threads], &attr, thread_main, c);
		c->nr_threads += !r;
	}
	pthread_attr_destroy(&attr);
	return r;
}

struct crew *crew_new(const struct crew_how *how)
{
	struct crew *c = calloc(1, sizeof(*c));
	size_t units = how->room / (how->unit ? how->unit : UNIT_LEAST) + 1;
	bool ok;
	int r;

	if (!c)
		return NULL;
	c->how = *how;
	pthread_mutex_init(&c->lock, NULL);
	pthread_cond_init(&c->work, NULL);
	pthread_cond_init(&c->done, NULL);
	c->nr_jobs = (how->room > ROOM_SMALL ? 2 : 4) * how->threads + 2;
	c->thread = calloc(how->threads, sizeof(*c->thread));
	c->job = calloc(c->nr_jobs, sizeof(*c->job));
	ok = c->thread && c->job;
	for (unsigned k = 0; ok && k < c->nr_jobs; k++) {
		c->job[k].buf = aligned_alloc(4096, (how->room + 4095) / 4096 * 4096);
		c->job[k].zero = calloc(units, sizeof(bool));
		ok = c->job[k].buf && c->job[k].zero;
		if (how->packs) {
			c->job[k].z = malloc(how->room);
			c->job[k].z_len = calloc(how->room / image_cluster(how->packs), sizeof(size_t));
			ok = ok && c->job[k].z && c->job[k].z_len;
		}
	}
	r = ok ? start_threads(c) : ENOMEM;
	if (!r)
		return c;
	crew_free(c);
	errno = r;
	return NULL;
}

void crew_free(struct crew *c)
{
	if (!c)
		return;
	pthread_mutex_lock(&c->lock);
	c->over = true;
	pthread_cond_broadcast(&c->work);
	pthread_mutex_unlock(&c->lock);
	for (unsigned k = 0; k < c->nr_threads; k++)
		pthread_join(c->thread[k], NULL);
	for (unsigned k = 0; c->job && k < c->nr_jobs; k++) {
		free(c->job[k].buf);
		free(c->job[k].zero);
		free(c->job[k].z);
		free(c->job[k].z_len);
	}
	image_scratch_free(&c->scratch);
	pthread_cond_destroy(&c->work);
	pthread_cond_destroy(&c->done);
	pthread_mutex_destroy(&c->lock);
	free(c->thread);
	free(c->job);
	free(c);
}

/* ---- the main thread ---- */

struct crew_job *crew_idle(struct crew *c)
{
	struct crew_job *j = NULL;

	pthread_mutex_lock(&c->lock);
	for (unsigned k = 0; k < c->nr_jobs && !j; k++)
		if (c->job[k].state == CREW_IDLE)
			j = &c->job[k];
	pthread_mutex_unlock(&c->lock);
	if (j) {
		j->nr = 0;
		j->filled = false;
		j->len = 0;
	}
	return j;
}

void crew_submit(struct crew *c, struct crew_job *j)
{
	pthread_mutex_lock(&c->lock);
	j->number = c->next++;
	j->state = CREW_QUEUED;
	pthread_cond_signal(&c->work);
	pthread_mutex_unlock(&c->lock);
}

/* Not idle, submitted first. */
static struct crew_job *first_out(struct crew *c)
{
	struct crew_job *best = NULL;

	for (unsigned k = 0; k < c->nr_jobs; k++)
		if (c->job[k].state != CREW_IDLE && (!best || c->job[k].number < best->number))
			best = &c->job[k];
	return best;
}

struct crew_job *crew_done(struct crew *c, bool any)
{
	struct crew_job *j;

	pthread_mutex_lock(&c->lock);
	while ((j = first_out(c))) {
		struct crew_job *done = any ? oldest(c, CREW_DONE) : j->state == CREW_DONE ? j : NULL;

		if (done) {
			j = done;
			break;
		}
		done = oldest(c, CREW_QUEUED);  /* rather than sleep */
		if (done)
			take(c, done, &c->scratch);
		else
			pthread_cond_wait(&c->done, &c->lock);
	}
	pthread_mutex_unlock(&c->lock);
	return j;
}

void crew_release(struct crew *c, struct crew_job *j)
{
	pthread_mutex_lock(&c->lock);
	j->state = CREW_IDLE;
	pthread_mutex_unlock(&c->lock);
}
