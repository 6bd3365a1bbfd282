"use strict";

/* The pictures of an image are in its radio buttons; two of them are laid over each other, and a divider clips the upper one. */
class Comparison {
  constructor(article) {
    this.article = article;
    this.size = { width: Number(article.dataset.width), height: Number(article.dataset.height) };
    this.pictures = new Map();
    for (const input of article.querySelectorAll(".thumb input")) {
      const image = input.parentElement.querySelector("img");
      this.pictures.set(input.value, { input, image, label: input.dataset.label, values: input.dataset.values });
    }
    const find = (selector) => article.querySelector(selector);
    this.frame = find(".frame");
    this.stage = find(".stage");
    this.canvas = find(".canvas");
    this.position = find(".position");
    this.divider = find(".divider");
    this.sides = {};
    for (const [side, layer] of [["left", ".under"], ["right", ".over"]]) {
      const parts = { image: find(layer), select: find(`select.${side}`), tag: find(`.tag.${side}`) };
      this.sides[side] = { ...parts, label: find(`dt.${side}`), values: find(`dd.${side}`) };
      for (const [key, picture] of this.pictures) parts.select.add(new Option(picture.label, key));
      parts.select.addEventListener("change", () => this.show(side, parts.select.value));
    }
    for (const { input } of this.pictures.values()) {
      input.addEventListener("change", () => this.show("right", input.value));
    }
    for (const input of article.querySelectorAll(".zoom input")) {
      input.addEventListener("change", () => this.zoom(input.value));
    }
    find(".swap").addEventListener("click", () => this.swap());
    this.position.addEventListener("input", () => this.place());
    this.stage.addEventListener("scroll", () => this.place());
    this.drag();
    find(".compare").hidden = false;
    const checked = find(".thumb input:checked");
    this.show("left", article.dataset.left);
    this.show("right", checked.value);
    this.factor = "fit";
    new ResizeObserver(() => this.zoom(this.factor)).observe(article);
  }

  show(side, key) {
    const { image, select, tag, label, values } = this.sides[side];
    const picture = this.pictures.get(key);
    image.src = picture.image.src;
    image.alt = picture.label;
    image.classList.toggle("lr", picture.image.classList.contains("lr"));
    select.value = key;
    if (side === "right") picture.input.checked = true;
    for (const place of [tag, label]) place.textContent = picture.label;
    values.replaceChildren(...picture.values.split(" · ").map((value) => Object.assign(document.createElement("span"), { textContent: value })));
    this.describe();
  }

  swap() {
    const [left, right] = [this.sides.left.select.value, this.sides.right.select.value];
    this.show("left", right);
    this.show("right", left);
  }

  /* Fit: as many whole pixels of the screen for each of the picture as the window has room for; fewer than one if need be. */
  zoom(value) {
    this.factor = value;
    const { width, height } = this.size;
    const room = this.frame.parentElement.clientWidth;
    const fitting = Math.min(room / width, (0.8 * window.innerHeight) / height);
    const whole = Math.floor(fitting * window.devicePixelRatio) / window.devicePixelRatio;
    const factor = value !== "fit" ? Number(value) : fitting < 1 ? fitting : whole;
    this.frame.classList.toggle("zoomed", value !== "fit" && factor * width > room);
    this.frame.classList.toggle("crisp", factor >= 1);
    this.canvas.style.width = `${factor * width}px`;
    this.canvas.style.height = `${factor * height}px`;
    this.frame.style.width = `${Math.min(room, factor * width)}px`;
    this.stage.tabIndex = this.frame.classList.contains("zoomed") ? 0 : -1;
    this.place();
  }

  /* The clip reaches beyond the other edges, which may lie between pixels of the screen. */
  place() {
    const part = Number(this.position.value) / 100;
    const width = this.stage.clientWidth;
    this.divider.style.left = `${part * width}px`;
    this.sides.right.image.style.clipPath = `inset(-1px -1px -1px ${this.stage.scrollLeft + part * width}px)`;
    this.describe();
  }

  describe() {
    const percent = Math.round(Number(this.position.value));
    const [left, right] = [this.sides.left.label.textContent, this.sides.right.label.textContent];
    this.position.setAttribute("aria-valuetext", `${percent} % ${left}, ${100 - percent} % ${right}`);
  }

  /* A pointer moves the divider from anywhere; where the picture is larger than its window, by its handle alone. */
  drag() {
    const follow = (event) => {
      const box = this.stage.getBoundingClientRect();
      this.position.value = (100 * (event.clientX - box.left)) / this.stage.clientWidth;
      this.place();
    };
    for (const target of [this.divider, this.stage]) {
      let from = null;
      target.addEventListener("pointerdown", (event) => {
        if (event.button !== 0) return;
        const pans = target === this.stage && this.frame.classList.contains("zoomed");
        if (pans && event.pointerType !== "mouse") return;
        from = { pans, x: event.clientX + this.stage.scrollLeft, y: event.clientY + this.stage.scrollTop };
        target.setPointerCapture(event.pointerId);
        this.position.focus({ preventScroll: true });
        event.preventDefault();
        if (!pans) follow(event);
      });
      target.addEventListener("pointermove", (event) => {
        if (from === null) return;
        if (from.pans) this.stage.scrollTo(from.x - event.clientX, from.y - event.clientY);
        else follow(event);
      });
      for (const end of ["pointerup", "pointercancel"]) target.addEventListener(end, () => (from = null));
    }
  }
}

const articles = [...document.querySelectorAll("article.image")];
articles.forEach((article) => new Comparison(article));
if (articles.length > 1) {
  const jump = document.querySelector(".jump");
  const select = jump.querySelector("select");
  for (const article of articles) select.add(new Option(article.querySelector("h2").textContent, article.id));
  select.addEventListener("change", () => document.getElementById(select.value).scrollIntoView());
  jump.hidden = false;
}
