#ifndef VMM_IOV_H
#define VMM_IOV_H
#include <stddef.h>
#include <sys/uio.h>

/* A window onto guest buffers that virtq_pop() has already proven to be RAM. A cursor: it advances. */
struct iov_view {
	const struct iovec *iov;
	unsigned cnt;           /* may overstate; len rules */
	size_t skip, len;       /* bytes of iov[0] already used; bytes left */
};

size_t iov_read(struct iov_view *v, void *dst, size_t n);        /* copy out and advance; short if v is */
size_t iov_write(struct iov_view *v, const void *src, size_t n); /* copy in and advance; short if v is */
size_t iov_zero(struct iov_view *v, size_t n);                   /* store zeroes and advance */
struct iov_view iov_take(struct iov_view *v, size_t n);          /* split the first n bytes off */
struct iov_view iov_take_back(struct iov_view *v, size_t n);     /* split the last n bytes off */

/* The window as plain iovecs for a system call; 0 if it does not fit in max (or is empty). */
unsigned iov_export(const struct iov_view *v, struct iovec *out, unsigned max);

/* Read one object; true if the window held all of it. */
#define IOV_GET(v, obj) (iov_read((v), (obj), sizeof *(obj)) == sizeof *(obj))
#endif
