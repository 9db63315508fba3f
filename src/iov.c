#include "vmm/iov.h"
#include <stdint.h>
#include <string.h>

enum dir { FROM_GUEST, TO_GUEST, ZERO_GUEST, SKIP };

static size_t move(struct iov_view *v, void *buf, size_t n, enum dir dir)
{
	size_t done = 0;

	if (n > v->len)
		n = v->len;
	while (done < n) {
		size_t room = v->iov->iov_len - v->skip;
		size_t step = n - done < room ? n - done : room;
		uint8_t *p = (uint8_t *)v->iov->iov_base + v->skip;

		switch (dir) {
		case FROM_GUEST:
			memcpy((uint8_t *)buf + done, p, step);
			break;
		case TO_GUEST:
			memcpy(p, (const uint8_t *)buf + done, step);
			break;
		case ZERO_GUEST:
			memset(p, 0, step);
			break;
		case SKIP:
			break;
		}
		done += step;
		v->skip += step;
		v->len -= step;
		if (v->skip == v->iov->iov_len) {
			v->iov++;
			v->cnt--;
			v->skip = 0;
		}
	}
	return done;
}

size_t iov_read(struct iov_view *v, void *dst, size_t n)
{
	return move(v, dst, n, FROM_GUEST);
}

size_t iov_write(struct iov_view *v, const void *src, size_t n)
{
	return move(v, (void *)src, n, TO_GUEST);
}

size_t iov_zero(struct iov_view *v, size_t n)
{
	return move(v, NULL, n, ZERO_GUEST);
}

struct iov_view iov_take(struct iov_view *v, size_t n)
{
	struct iov_view head = *v;

	head.len = move(v, NULL, n, SKIP);
	return head;
}

struct iov_view iov_take_back(struct iov_view *v, size_t n)
{
	struct iov_view tail = *v;

	if (n > v->len)
		n = v->len;
	move(&tail, NULL, v->len - n, SKIP);
	v->len -= n;
	return tail;
}

unsigned iov_export(const struct iov_view *v, struct iovec *out, unsigned max)
{
	size_t left = v->len, skip = v->skip;
	unsigned n = 0;

	for (const struct iovec *i = v->iov; left; i++, skip = 0) {
		size_t step = i->iov_len - skip < left ? i->iov_len - skip : left;

		if (n == max)
			return 0;
		out[n++] = (struct iovec){ (uint8_t *)i->iov_base + skip, step };
		left -= step;
	}
	return n;
}
