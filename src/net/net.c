#include "vmm/net.h"
#include <errno.h>
#include <string.h>
#include "net/backends.h"
#include "vmm/error.h"
#include "vmm/opts.h"

static const struct net_class *const backends[] = {
	&net_user,
	&net_fd,
};

/* A back end by the first len bytes of name; none given: the first of the table. */
static const struct net_class *find(const char *name, size_t len)
{
	if (!len)
		return backends[0];
	for (size_t i = 0; i < sizeof(backends) / sizeof(backends[0]); i++)
		if (strlen(backends[i]->name) == len && !memcmp(backends[i]->name, name, len))
			return backends[i];
	return NULL;
}

static int unknown(const char *option, const char *name, struct error *err)
{
	return error_set(err, EINVAL, "%s: no back end '%s': accepted are user, fd and none", option, name);
}

int net_prepare(struct spawner *s, const char *args, struct error *err)
{
	size_t len = strcspn(args, ",");
	const struct net_class *c;

	if (memchr(args, '=', len))
		len = 0;                /* "--net fwd=…": the default back end */
	c = find(args, len);
	if (!c)
		return unknown("--net", args, err);
	return c->prepare ? c->prepare(s, err) : 0;
}

int net_open(struct net_backend *ret, struct vm *vm, struct opts *o, struct error *err)
{
	const char *name = opts_str(o, "backend");
	const struct net_class *c = find(name, name ? strlen(name) : 0);

	memset(ret, 0, sizeof(*ret));
	ret->fd = -1;
	return c ? c->open(ret, vm, o, err) : unknown(opts_option(o), name, err);
}
