#ifndef VMM_ERROR_H
#define VMM_ERROR_H
/*
 * Why a host-side operation failed, in words for the person who asked for it. The struct lives on the
 * caller's stack; words are added once, at the layer that knows the name: lower case, no full stop.
 */
struct error {
	int code;       /* positive errno */
	char msg[400];
};

/* Fill err (may be NULL) and return -code, so that "return error_set(err, EINVAL, ...)" reads well. */
__attribute__((format(printf, 3, 4)))
int error_set(struct error *err, int code, const char *fmt, ...);

/* As error_set(), with ": " and the text of the errno value appended. */
__attribute__((format(printf, 3, 4)))
int error_errno(struct error *err, int code, const char *fmt, ...);

/* Put words in front of the message: error_prefix(err, "disk '%s': ", path). */
__attribute__((format(printf, 2, 3)))
void error_prefix(struct error *err, const char *fmt, ...);
#endif
