// Small helpers for the page's elements.

export function byId(id) {
  return document.getElementById(id);
}

/** Let the browser save content as a file. */
export function saveAs(name, type, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Return a sentence for a person. */
export function describe(error) {
  const known = {
    NotAllowedError: "The microphone is not allowed. Allow it for this page in the browser’s settings, then try again.",
    NotFoundError: "No microphone was found. Plug one in, or open a file.",
    NotReadableError: "The microphone is busy or broken: another program may use it.",
  };
  return known[error.name] ?? error.message;
}
