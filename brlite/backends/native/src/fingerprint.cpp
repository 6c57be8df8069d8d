// build.py's hash of the sources and flags. library.py loads only a library whose hash is that of its own sources.
#if !defined(BRLITE_FINGERPRINT)
#define BRLITE_FINGERPRINT "unknown"
#endif

extern "C" __attribute__((visibility("default"))) const char* brlite_fingerprint(void) { return BRLITE_FINGERPRINT; }
