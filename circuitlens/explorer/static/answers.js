// -- questions and answers ---------------------------------------------------------------------

class Answers {
  constructor(model, lacking, changed) {
    Object.assign(this, { model, lacking, changed, got: new Map(), actions: [], late: false });
    this.view = Math.random().toString(36).slice(2);
    this.count = 0;
    this.flying = null;
    this.receive = (message, buffers) => this.#receive(message, buffers);
    model.on("msg:custom", this.receive);
  }

  close() {
    clearTimeout(this.timer);
    this.model.off("msg:custom", this.receive);
  }

  of(key) {
    return this.got.get(key);
  }

  /** Ask something once, out of turn; `done` gets the answer. */
  act(question, done) {
    this.actions.push({ key: null, question, done });
    this.next();
  }

  forget(key) {
    this.got.delete(key);
    this.next();
  }

  next() {
    if (this.flying === null) {
      const wanted = this.actions.shift() ?? this.lacking((key) => this.got.has(key));
      if (wanted) this.#ask(wanted);
    }
    this.changed();
  }

  #ask(wanted) {
    this.flying = { ...wanted, id: `${this.view}:${++this.count}` };
    this.timer = setTimeout(() => {
      this.late = true;
      this.changed();
    }, PATIENCE);
    try {
      this.model.send({ ...wanted.question, id: this.flying.id });
    } catch (error) {
      this.#settle({ ok: false, error: `The kernel cannot be reached: ${error.message}` }, []);
    }
  }

  #receive(message, buffers) {
    if (this.flying !== null && message.id === this.flying.id) this.#settle(message, buffers);
  }

  #settle(message, buffers) {
    clearTimeout(this.timer);
    const { key, done } = this.flying;
    this.flying = null;
    this.late = false;
    if (key !== null) {
      const data = (buffers ?? []).map(
        (b) => new Float32Array(b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength)),
      );
      this.got.set(key, { ...message, data });
      if (this.got.size > KEPT_ANSWERS) this.got.delete(this.got.keys().next().value);
    }
    done?.(message);
    this.next();
  }
}
