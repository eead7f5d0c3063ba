// The gallery of flipped answers: cards are made from the data when they are shown.
{
  const holder = document.getElementById("flipped");
  const { sets, texts, methods, rows, images } = JSON.parse(
    document.getElementById("flipped-data").textContent
  );
  const PAGE = 24;
  const MAX_WORDS = 400;
  const [set, side, words] = ["set", "side", "words"].map((name) =>
    document.querySelector(`.filters [name=${name}]`)
  );
  const count = document.querySelector(".filters .count");
  const more = document.querySelector(".more");
  let found = [];
  let shown = 0;

  const element = (name, text, kind) => {
    const made = document.createElement(name);
    if (text) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };

  // Words of `b` that are no part of the longest common subsequence with `a`.
  const changed = (a, b) => {
    if (a.length > MAX_WORDS || b.length > MAX_WORDS) return b.map(() => false);
    const length = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--)
      for (let j = b.length - 1; j >= 0; j--)
        length[i][j] =
          a[i] === b[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
    const marks = b.map(() => true);
    for (let i = 0, j = 0; i < a.length && j < b.length; ) {
      if (a[i] === b[j]) (marks[j] = false), i++, j++;
      else if (length[i + 1][j] >= length[i][j + 1]) i++;
      else j++;
    }
    return marks;
  };

  const marked = (text, other) => {
    const pre = element("pre");
    const own = text.split(/(\s+)/);
    const marks = changed(other.split(/\s+/), own.filter((_, n) => n % 2 === 0));
    own.forEach((part, n) =>
      pre.append(n % 2 === 0 && part && marks[n / 2] ? element("mark", part) : part)
    );
    return pre;
  };

  // Tokens that guidance changed, by their places.
  const explained = (text, spans) => {
    const pre = element("pre");
    const characters = [...text]; // of which JavaScript counts some twice
    const part = (start, end) => characters.slice(start, end).join("");
    let last = 0;
    for (const [start, end] of spans) {
      pre.append(part(last, start), element("mark", part(start, end)));
      last = end;
    }
    pre.append(part(last));
    return pre;
  };

  const card = ([setNumber, won, id, question, base, aligned, references, image, spans]) => {
    const made = element("div", "", "card");
    if (image !== null) {
      const picture = element("img");
      Object.assign(picture, { src: images[image], alt: question, loading: "lazy" });
      made.append(picture);
    }
    made.append(element("div", question, "question"));
    made.append(
      element("div", `${won > 0 ? texts.won : texts.lost}: ${sets[setNumber]}`, `flag ${won > 0 ? "good" : "bad"}`)
    );
    const list = element("dl");
    for (const [name, body] of [
      [methods[0], marked(base, aligned)],
      [methods[1], spans.length ? explained(aligned, spans) : marked(aligned, base)],
      [texts.reference, element("span", references)],
      ["id", element("span", id)],
    ]) {
      const value = element("dd");
      value.append(body);
      list.append(element("dt", name), value);
    }
    made.append(list);
    return made;
  };

  const show = () => {
    const next = found.slice(shown, shown + PAGE);
    holder.append(...next.map(card));
    shown += next.length;
    more.hidden = shown >= found.length;
    count.textContent = texts.count.replace("{shown}", shown).replace("{all}", found.length);
  };

  const filter = () => {
    const text = words.value.trim().toLowerCase();
    found = rows.filter(
      (row) =>
        (set.value === "" || row[0] === Number(set.value)) &&
        (side.value === "" || row[1] === Number(side.value)) &&
        (!text || [row[2], row[3], row[4], row[5]].some((part) => part.toLowerCase().includes(text)))
    );
    holder.replaceChildren();
    shown = 0;
    show();
  };

  for (const control of [set, side]) control.addEventListener("change", filter);
  words.addEventListener("input", filter);
  more.addEventListener("click", show);
  filter();
}
