// The endpoints of /openapi.json, one card each, with the fields of their bodies.

document.getElementById("base").textContent = `${location.origin}/v1`;

function element(name, text, className) {
  const found = document.createElement(name);
  if (text) found.textContent = text;
  if (className) found.className = className;
  return found;
}

const api = await (await fetch("/openapi.json")).json();
const named = (schema) => (schema?.$ref ? api.components.schemas[schema.$ref.split("/").pop()] : schema);

function kind(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf || schema.oneOf) return (schema.anyOf ?? schema.oneOf).map(kind).filter((each) => each !== "null").join(" or ");
  if (schema.enum || schema.const !== undefined) return (schema.enum ?? [schema.const]).map((each) => JSON.stringify(each)).join(" or ");
  if (schema.type === "array") return `list of ${schema.items ? kind(schema.items) : "anything"}`;
  const bounds = ["minimum", "exclusiveMinimum", "maximum"].filter((each) => schema[each] !== undefined);
  const range = bounds.map((each) => ({ minimum: "from", exclusiveMinimum: "above", maximum: "to" })[each] + ` ${schema[each]}`);
  return [schema.type ?? "anything", ...range].join(" ");
}

function fields(schema) {
  const table = element("table"), required = schema.required ?? [];
  const rank = (name, field) => (required.includes(name) ? 0 : field.description?.includes("without an effect") ? 2 : 1);
  const sorted = Object.entries(schema.properties ?? {}).sort((a, b) => rank(...a) - rank(...b));
  for (const [name, field] of sorted) {
    const row = element("tr"), head = element("th", name + (required.includes(name) ? " *" : ""));
    head.scope = "row";
    const about = [field.description, field.default !== undefined && field.default !== null ? `default ${JSON.stringify(field.default)}` : ""];
    row.append(head, element("td", kind(field)), element("td", about.filter(Boolean).join(" ")));
    table.append(row);
  }
  return table;
}

for (const [path, methods] of Object.entries(api.paths))
  for (const [method, about] of Object.entries(methods)) {
    const card = element("section", "", "card"), title = element("h2");
    title.append(element("code", `${method.toUpperCase()} ${path}`));
    card.append(title, element("p", about.summary));
    if (about.description) card.append(element("p", about.description, "note"));
    const body = named(about.requestBody?.content?.["application/json"]?.schema);
    if (body?.properties) {
      const more = element("details");
      more.append(element("summary", "Fields (* required)"), fields(body));
      card.append(more);
    }
    document.getElementById("paths").append(card);
  }
